"""attention: each query row against its own sequence's cached keys and values, read through a block table."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.axes import (
    CACHES,
    CONTEXT,
    HEAD_DIMS,
    HEADS,
    PAGE_SIZES,
    ROWS,
    SPREADS,
    STORED,
    as_stored,
    fits_f16,
)
from kernelmux.graph.ops.cases import Case, like
from kernelmux.graph.ops.domain import Domain, Extent, Point
from kernelmux.graph.ops.op import Op, Operands, own_fields, row_count
from kernelmux.graph.ops.spreads import Between, Draw, Like, Listed, extremes

if TYPE_CHECKING:
    import torch

    from kernelmux.graph.graph import TensorNode


class Attention(Op):
    """y = softmax(scale * q Kᵀ) V, causal, grouped-query, over a paged cache; prefill, decode and both in one batch.

    Axes: m query rows of all sequences in a row; num_heads, num_kv_heads, head_dim; pages of page_size.
    Inputs: q [m, num_heads * head_dim]; k_cache, v_cache [pages, page_size, num_kv_heads, head_dim]; query_start
    [seqs + 1], i32: sequence s owns rows query_start[s] to query_start[s + 1]; kv_len [seqs], i32: its cached length,
    these rows included; block_table [seqs, width], i32: its pages in order; weight, optional [num_heads]: sinks, each
    one more score of its head in every softmax, of no value (Xiao et al. 2023, arXiv:2309.17453; learned in gpt-oss).
    Fields: scale; window (a row sees that many positions, itself included); chunk (a row sees none of an earlier chunk
    of so many positions, as in Llama 4); soft_cap (c * tanh(scores / c)).
    Outputs: y [m, num_heads * head_dim].
    Constraints: query head h reads kv head h // (num_heads / num_kv_heads). The sequence's rows are its last positions.
    Numerics: rows of no sequence, and of a sequence of length 0, are zeros, never NaN.
    """

    name = "attention"
    inputs = ("q", "k_cache", "v_cache", "query_start", "kv_len", "block_table")
    outputs = ("y",)
    fields = ("num_heads", "num_kv_heads", "head_dim", "scale")
    optional = ("window", "chunk", "soft_cap", "weight")
    told = {
        "m": row_count,
        **own_fields("num_heads", "num_kv_heads", "head_dim", "layer"),
        "cache_format": lambda node: node.inputs[1].format,
        "sinks": lambda node: bool(node.weight),
    }

    def infer(self, node: TensorNode, format: str) -> tuple[Value, ...]:
        q, k_cache, v_cache, query_start, kv_len, block_table = node.inputs
        self.require_rows(node, q)
        for value, rank in ((query_start, 1), (kv_len, 1), (block_table, 2)):
            fits = value.format == "i32" and len(value.shape) == rank
            self.require(fits, node, f"{value.name} must be i32 of rank {rank}, it is {value.format} {value.shape}")
        self.require(block_table.shape[0] == kv_len.shape[0], node, "block_table and kv_len differ in sequences")
        self.require(
            node.num_heads % node.num_kv_heads == 0,
            node,
            f"{node.num_heads} query heads do not divide over {node.num_kv_heads} kv heads",
        )
        self.require_heads(node, q, node.num_heads)
        self.require_caches(node, k_cache, v_cache)
        for sinks in node.weight:
            fits = sinks.shape == (node.num_heads,)
            self.require(fits, node, f"{sinks.name} is {sinks.shape}; sinks are one for each of {node.num_heads} heads")
        return (self.output(node, 0, q.shape, format),)

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        import torch

        q, k_cache, v_cache, query_start, kv_len, block_table = operands.inputs
        y = torch.zeros_like(q)
        starts, lengths = query_start.tolist(), kv_len.tolist()
        page_size = k_cache.shape[1]
        for seq, length in enumerate(lengths):
            rows = slice(starts[seq], starts[seq + 1])
            if length == 0 or rows.start == rows.stop:
                continue
            pages = block_table[seq, : -(-length // page_size)].long()
            keys, values = (cache[pages].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
            y[rows] = self._one_sequence(node, q[rows], keys, values, operands.weight)
        return (y,)

    def _one_sequence(
        self,
        node: TensorNode,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sinks: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        """q [rows, heads * dim] against keys and values [length, kv_heads, dim]."""
        import torch

        group = node.num_heads // node.num_kv_heads
        heads = q.view(len(q), node.num_heads, -1)
        keys, values = (cached.repeat_interleave(group, dim=1) for cached in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", heads, keys) * node.scale
        if node.soft_cap:
            scores = node.soft_cap * torch.tanh(scores / node.soft_cap)
        seen = visible(len(q), len(keys), node.window, q.device, node.chunk)
        scores = scores.masked_fill(~seen, -math.inf)
        beside = [each.view(-1, 1, 1).expand(-1, len(q), 1) for each in sinks]
        shares = torch.cat([scores, *beside], dim=-1).softmax(dim=-1)[..., : len(keys)]
        # In float32 a BLAS may add one position after the other: 8,192 equal ones are 1e-4 off.
        return torch.einsum("hqk,khd->qhd", shares.double(), values.double()).to(q.dtype).flatten(1)

    def flops(self, node: TensorNode) -> int:
        """Of every cached position with every row: an upper bound where rows see less."""
        q, k_cache, *_ = node.inputs
        m, width = q.extents
        pages, page_size, *_ = k_cache.extents
        return 4 * m * width * pages * page_size

    def domain(self) -> Domain:
        return Domain(
            self._drawn,
            {
                "heads": HEADS,
                "dim": HEAD_DIMS,
                "step": ("chunk", "decode", "prefill", "mixed"),
                "cache": CACHES,
                "page_size": PAGE_SIZES,
                "window": (0, 17, 1024),
                "chunk": (0, 13, 512),
                "values": tuple(spread for spread in SPREADS if spread != "outliers"),
                **STORED,
                "scale": (False, True),
                "soft_cap": (0.0, 30.0),
                "sinks": (False, True),
                "padding": (0, 3),
            },
            {"context": CONTEXT, "rows": ROWS, "sequences": Extent(1, 512, counts=(1,))},
            _work,
            _holds,
        )

    def _drawn(self, label: str, point: Point) -> Case:
        heads, kv_heads = point["heads"]
        stated = {key: point[key] for key in ("dim", "page_size", "window", "chunk", "soft_cap", "sinks", "padding")}
        made = self._case(
            label,
            _sequences(point),
            heads,
            kv_heads,
            scale=0.3 if point["scale"] else 0.0,
            format=point["cache"],
            **stated,
        )
        # Where queries and keys are both large, scores lie so far apart that float32 cannot tell which is the first.
        ports = ("q", "v_cache") if point["values"] == "uneven" else ("q", "k_cache", "v_cache")
        return as_stored(like(point["values"], made, *ports), point["stored"])

    def cases(self) -> Iterator[Case]:
        yield from self._shapes()
        yield from self._batches()
        yield from self._scores()
        yield from self._sunk()
        yield from self._memory()

    def _shapes(self) -> Iterator[Case]:
        """Heads and lengths: on and around a page's edge, and beyond the tiles and partitions of kernels."""
        heads = ((9, 3, 64), (32, 8, 128), (28, 4, 128), (4, 4, 64), (8, 1, 96), (4, 2, 80), (2, 1, 256))
        for query, kv, dim in heads:
            shape: dict[str, Any] = {"heads": query, "kv_heads": kv, "dim": dim}
            label = f"h{query}-kv{kv}-d{dim}"
            for context in (1, 15, 16, 17, 33):
                yield self._case(f"decode-{context}-{label}", [(1, context)], **shape)
            yield self._case(f"prefill-20-{label}", [(20, 20)], **shape)
            yield self._case(f"mixed-{label}", [(1, 33), (12, 12), (1, 1), (5, 48)], **shape)
            yield self._case(f"window-{label}", [(9, 40), (1, 64)], window=17, **shape)
            yield self._case(f"soft-cap-{label}", [(9, 40), (1, 64)], soft_cap=5.0, **shape)
        for context in (31, 32, 47, 48, 49, 64, 200, 512, 1000, 1500):
            yield self._case(f"decode-{context}", [(1, context)])
        yield self._case("decode-4100", [(1, 4100), (1, 4096)], heads=4, kv_heads=1)
        for rows in (1, 2, 3, 5, 8, 15, 16, 17, 40, 64, 128, 200):
            yield self._case(f"prefill-{rows}", [(rows, rows)])
        yield self._case("prefill-512", [(512, 512)], heads=4, kv_heads=2)
        for rows, length in ((7, 40), (16, 48), (1, 17), (33, 34), (2, 300), (150, 290)):
            yield self._case(f"chunk-{rows}-of-{length}", [(rows, length)])

    def _batches(self) -> Iterator[Case]:
        """Several sequences in one step: decoding, prefilling, waiting, empty, and padding rows."""
        for label, sequences in _BATCHES.items():
            yield self._case(label, sequences)
        yield self._case("batch-of-130", [(1, 1 + index) for index in range(130)], heads=4, kv_heads=2)
        yield self._case("all-empty", [(0, 0), (0, 0)], padding=2)
        for padding in (1, 2, 3, 6):
            yield self._case(f"padding-{padding}", [(2, 18), (1, 5)], padding=padding)

    def _scores(self) -> Iterator[Case]:
        """Windows, caps, scales and extremes."""
        for window in (1, 8, 16, 17, 40, 100):
            yield self._case(f"window-{window}", [(9, 40), (1, 64), (1, 3)], window=window)
        yield self._case("window-7", [(4, 40), (1, 64)], window=7)
        # Whole pages and tiles before the window: a maximum over nothing is -inf, and -inf from -inf is NaN.
        yield self._case("window-long", [(1, 300), (40, 200), (150, 150)], window=20)
        yield from self._chunked()
        for cap in (1.0, 5.0, 50.0):
            yield self._case(f"soft-cap-{cap:g}", [(4, 30), (1, 17)], soft_cap=cap)
        yield self._case("window-soft-cap", [(4, 30)], window=6, soft_cap=5.0)
        yield self._case("loud", [(3, 40)], loud=30.0)
        yield self._case("scale", [(3, 40)], scale=0.3)
        for label in extremes():
            yield self._case(label, [(3, 40), (1, 17)], spread=label)

    def _chunked(self) -> Iterator[Case]:
        """Chunks: rows at the first and the last position of one, over several, of tiles and pages in part."""
        for chunk in (1, 8, 16, 17, 40, 100):
            yield self._case(f"chunked-{chunk}", [(9, 40), (1, 64), (1, 3), (1, 65)], chunk=chunk)
        yield self._case("chunked-at-the-edge", [(1, 32), (1, 33), (2, 33), (1, 34), (32, 64)], chunk=32)
        # Whole pages and tiles before the chunk: a maximum over nothing is -inf, and -inf from -inf is NaN.
        yield self._case("chunked-long", [(1, 300), (40, 200), (150, 150), (1, 1025)], chunk=128)
        for query, kv, dim in ((32, 8, 128), (8, 1, 96), (2, 1, 256)):
            shape: dict[str, Any] = {"heads": query, "kv_heads": kv, "dim": dim}
            yield self._case(f"chunked-h{query}-kv{kv}-d{dim}", [(9, 40), (1, 64)], chunk=17, **shape)
        for format in ("bf16", "f16", "fp8_row"):
            yield self._case(f"chunked-{format}", [(9, 40), (1, 64), (2, 0)], padding=2, chunk=17, format=format)
        yield self._case("chunked-window", [(9, 40), (1, 64)], chunk=17, window=6)
        yield self._case("chunked-soft-cap", [(4, 30)], chunk=7, soft_cap=5.0)
        yield self._case("chunked-sinks", [(9, 40), (1, 300)], chunk=17, sinks=True)
        yield self._case("chunked-unseen-nan", [(1, 90), (20, 41), (2, 0)], padding=2, chunk=17, unseen=True)

    def _sunk(self) -> Iterator[Case]:
        """Sinks: beside scores, far above and far below all, and where nothing is seen."""
        for query, kv, dim in ((9, 3, 64), (64, 8, 64), (8, 1, 96)):
            shape: dict[str, Any] = {"heads": query, "kv_heads": kv, "dim": dim, "sinks": True}
            for label, sequences in {**_STEPS, "long": [(1, 1500)]}.items():
                yield self._case(f"sinks-{label}-h{query}-kv{kv}-d{dim}", sequences, **shape)
        for format in ("bf16", "f16", "fp8_row"):
            yield self._case(f"sinks-{format}", [(9, 40), (1, 300), (2, 0)], padding=2, format=format, sinks=True)
        # A result that is rounded before the sink takes its share is rounded twice.
        for length in (13, 40, 100):
            yield self._case(f"sinks-bf16-decode-{length}", [(1, length)], format="bf16", sinks=True)
        yield self._case("sinks-window", [(9, 40), (1, 64), (40, 200)], window=17, sinks=True)
        yield self._case("sinks-window-soft-cap", [(4, 30), (1, 900)], window=6, soft_cap=5.0, sinks=True)
        yield self._case("sinks-no-length", [(1, 9), (2, 0), (0, 5)], padding=2, sinks=True)
        yield self._case("sinks-unseen-nan", [(1, 9), (3, 20), (7, 70)], padding=2, unseen=True, sinks=True)
        for level in (-200.0, -10.0, 20.0):
            yield self._case(f"sinks-at{level:+g}", [(3, 40), (1, 300)], sinks=True, level=level)

    def _memory(self) -> Iterator[Case]:
        """Pages: their sizes, the cache's formats, and what lies where no sequence has written."""
        for page_size in (1, 8, 32, 64, 256):
            yield self._case(f"pages-of-{page_size}", [(1, 70), (5, 64), (3, 3)], page_size=page_size)
        for format in ("bf16", "f16", "fp8_row"):
            for label, sequences in _STEPS.items():
                yield self._case(f"{format}-{label}", sequences, format=format)
            yield self._case(f"{format}-window", [(9, 40), (1, 64)], window=17, format=format)
            yield self._case(f"{format}-soft-cap", [(9, 40), (1, 64)], soft_cap=5.0, format=format)
            yield self._case(f"{format}-padding", [(2, 18), (1, 5)], padding=3, format=format)
        for query, kv, dim in ((32, 8, 128), (4, 2, 80), (2, 1, 256)):
            shape: dict[str, Any] = {"heads": query, "kv_heads": kv, "dim": dim, "format": "fp8_row"}
            yield self._case(f"fp8_row-h{query}-kv{kv}-d{dim}", [(1, 33), (5, 48)], **shape)
        yield self._case("fp8_row-pages-of-64", [(1, 70), (5, 64)], page_size=64, format="fp8_row")
        yield self._case("fp8_row-unseen-nan", [(1, 9), (3, 20), (2, 0)], padding=2, unseen=True, format="fp8_row")
        # Pages that hold whole tiles of two-byte elements, as copy engines read them.
        for window in (0, 40):
            label, paged = f"-window-{window}" if window else "", [(1, 70), (150, 290), (2, 0)]
            yield self._case(
                f"bf16-unseen-nan-pages-of-256{label}", paged, page_size=256, window=window, unseen=True, format="bf16"
            )
        # Such memory may hold anything; weighed by zero, a NaN is still one.
        steps = ((1, 9), (3, 20), (2, 0), (1, 64), (0, 5), (7, 70), (0, 0))
        yield self._case("unseen-nan", steps, padding=2, unseen=True)
        yield self._case("unseen-nan-pages-of-32", steps, page_size=32, unseen=True)
        yield self._case("unseen-nan-window", [(1, 90), (20, 41)], window=17, unseen=True)

    def _case(
        self,
        label: str,
        sequences: Sequence[tuple[int, int]],
        heads: int = 9,
        kv_heads: int = 3,
        dim: int = 64,
        padding: int = 0,
        window: int = 0,
        chunk: int = 0,
        soft_cap: float = 0.0,
        loud: float = 1.0,
        scale: float = 0.0,
        page_size: int = 16,
        format: str = "f32",
        spread: str = "",
        unseen: bool = False,
        sinks: bool = False,
        level: float = 0.0,
    ) -> Case:
        """`sequences`: (query rows, cached length) each.

        q is `loud` noise, the caches noise in `format`, or all three the extreme that `spread` names; `unseen`: what no
        sequence has written is NaN; `sinks` lie around `level`.
        """

        counts, lengths = zip(*sequences, strict=True)
        starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        dealt, spare = _deal([-(-length // page_size) for length in lengths])
        m, width = starts[-1] + padding, max([*map(len, dealt), 1])

        def cache(generator: torch.Generator) -> torch.Tensor:
            values = like_all[1](generator)
            values[spare] = math.nan
            for row, length in zip(dealt, lengths, strict=True):
                if length % page_size:
                    values[row[-1], length % page_size :] = math.nan
            return values

        cache_shape = (sum(map(len, dealt)) + 1, page_size, kv_heads, dim)
        # Beyond a sequence's pages a row names one that is nobody's.
        table = [row + [spare] * (width - len(row)) for row in dealt]
        state = {"query_start": starts, "kv_len": lengths, "block_table": table}
        shapes = {"query_start": (len(starts),), "kv_len": (len(lengths),), "block_table": (len(table), width)}
        inputs = (
            Value("q", (m, heads * dim)),
            *(Value(name, cache_shape, format) for name in ("k_cache", "v_cache")),
            *(Value(name, shape, "i32") for name, shape in shapes.items()),
        )
        fields: dict[str, Any] = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}
        fields |= {"scale": scale or dim**-0.5, "window": window, "chunk": chunk, "soft_cap": soft_cap}
        fields["weight"] = (Value("sinks", (heads,)),) if sinks else ()
        like_all = Like(spread or "noise", (m, heads * dim)), Like(spread or "noise", cache_shape)
        draw: dict[str, Draw] = {"q": like_all[0] if loud == 1 else lambda generator: loud * like_all[0](generator)}
        draw |= dict.fromkeys(("k_cache", "v_cache"), cache if unseen else like_all[1])
        draw |= {name: Listed(numbers) for name, numbers in state.items()}
        draw |= {"sinks": Between(level - 1.0, level + 1.0, (heads,))} if sinks else {}
        return self.make_case(label, inputs, fields, draw, weights=math.prod(cache_shape))


_BATCHES: Mapping[str, Sequence[tuple[int, int]]] = {
    "batch": [(1, length) for length in (1, 16, 17, 100, 5, 64, 31, 2)],
    "batch-of-20": [(1, 3 + 7 * index) for index in range(20)],
    "prefills": [(5, 5), (1, 1), (17, 17), (16, 16)],
    "empty": [(1, 9), (0, 0), (3, 3)],
    "first-empty": [(0, 0), (2, 20)],
    # A length of 0 with rows, as captured steps pad their batch: zeros, whatever the pages hold.
    "no-length": [(1, 9), (2, 0), (1, 3)],
    "only-no-length": [(1, 0), (4, 0)],
    # Cached, without a row in this step.
    "idle": [(0, 40), (2, 20), (0, 16), (1, 5), (0, 7)],
}

_STEPS: Mapping[str, Sequence[tuple[int, int]]] = {
    "decode": [(1, 70)],
    "prefill": [(40, 40)],
    "mixed": [(1, 33), (12, 12), (1, 1), (5, 48), (2, 0)],
}


def _sequences(point: Point) -> list[tuple[int, int]]:
    """(query rows, cached length) of each sequence: the first has the point's context, the others are short.

    In a chunk the point's rows come after its context.
    """
    step: str = point["step"]
    context: int = point["context"]
    rows: int = point["rows"]
    first = {"decode": (1, context), "prefill": (context, context)}.get(step, (rows, context + rows))
    others = {
        "decode": ((1, 1), (1, 20), (1, 33)),
        "prefill": ((1, 1), (3, 3), (2, 2)),
        "chunk": ((2, 9), (1, 17), (3, 20)),
        # One of each kind: without rows, without anything cached, idle.
        "mixed": ((0, 0), (1, 18), (2, 0), (0, 5), (3, 3)),
    }[step]
    return [first, *(others[index % len(others)] for index in range(point["sequences"] - 1))]


def _holds(point: Point) -> bool:
    step, rows = point["step"], point["rows"]
    if step == "prefill" and point["context"] > ROWS.high:
        return False
    return fits_f16(point) and (rows == 1 or step not in ("decode", "prefill"))


def _work(point: Point) -> int:
    """Caches and rows; scores a quarter, as each is multiplied by a whole head."""
    query_heads, kv_heads = point["heads"]
    context, page_size, dim, others = point["context"], point["page_size"], point["dim"], point["sequences"] - 1
    rows = context if point["step"] == "prefill" else point["rows"]
    context += rows if point["step"] in ("chunk", "mixed") else 0
    pages = -(-context // page_size)
    cached = 2 * (pages + 1 + others * -(-20 // page_size)) * page_size * kv_heads * dim
    scores = (rows * context + others * 40) * query_heads
    # Each sequence of the batch is as many small calls.
    return int(cached + scores * dim // 16 + others * (pages + 500) + 2 * (rows + others * 2) * query_heads * dim)


def _deal(counts: Sequence[int]) -> tuple[list[list[int]], int]:
    """Pages in shuffled order, as many to each sequence as asked, and one that is nobody's."""
    order = list(range(sum(counts) + 1))
    random.Random(sum(counts)).shuffle(order)
    return [[order.pop() for _ in range(count)] for count in counts], order[0]


def visible(rows: int, length: int, window: int, device: torch.device, chunk: int = 0) -> torch.Tensor:
    """Which of `length` positions each of the last `rows` positions sees: [rows, length]."""
    import torch

    positions = torch.arange(length - rows, length, device=device)
    return sees(positions, torch.arange(length, device=device), window, chunk)


def sees(positions: torch.Tensor, keys: torch.Tensor, window: int, chunk: int) -> torch.Tensor:
    """Which positions of keys each position sees: [positions, keys], causal, within its window and chunk if any."""
    rows = positions.unsqueeze(1)
    mask = keys <= rows
    if chunk:
        mask &= keys >= rows // chunk * chunk
    return mask & (keys > rows - window) if window else mask
