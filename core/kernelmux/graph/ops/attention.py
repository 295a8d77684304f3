"""attention: each query row against its own sequence's cached keys and values, read through a block table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.attention_cases import paged_case, written_cases
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
                "window": (0, 17, 1024, 4096),
                "chunk": (0, 13, 512, 8192),
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
        made = paged_case(
            self,
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
        return written_cases(self)


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
