"""The cases of attention: how one is made of its sequences and its pages, and those that are written by hand.

Enters: the op. Leaves: cases, whose numbers are drawn when they are wanted.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.cases import Case
from kernelmux.graph.ops.op import Op
from kernelmux.graph.ops.spreads import Between, Draw, Like, Listed, extremes

if TYPE_CHECKING:
    import torch

Make = Callable[..., Case]
"""`paged_case` of the op."""


def written_cases(op: Op) -> Iterator[Case]:
    """Those written by hand."""
    make = partial(paged_case, op)
    yield from _shapes(make)
    yield from _batches(make)
    yield from _scores(make)
    yield from _sunk(make)
    yield from _memory(make)


def paged_case(
    op: Op,
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
    wider: int = 0,
    shared: int = 0,
) -> Case:
    """A case of attention of `sequences`, (query rows, cached length) each.

    q is `loud` noise, the caches noise in `format`, or all three the extreme that `spread` names; `unseen`: what no
    sequence has written is NaN; `sinks` lie around `level`. The table is so many pages `wider` than any sequence needs;
    the first `shared` pages of all sequences are the same, as those of a prompt that they have in common.
    """
    counts, lengths = zip(*sequences, strict=True)
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    dealt, spare = _deal([-(-length // page_size) for length in lengths])
    dealt = [[*dealt[0][: min(shared, len(pages))], *pages[shared:]] for pages in dealt]
    m, width = starts[-1] + padding, max([*map(len, dealt), 1]) + wider

    def cache(generator: torch.Generator) -> torch.Tensor:
        values = like_all[1](generator)
        values[spare] = math.nan
        for row, length in zip(dealt, lengths, strict=True):
            if length % page_size:
                values[row[-1], length % page_size :] = math.nan
        return values

    cache_shape = (1 + sum(-(-length // page_size) for length in lengths), page_size, kv_heads, dim)
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
    return op.make_case(label, inputs, fields, draw, weights=math.prod(cache_shape))


def _deal(counts: Sequence[int]) -> tuple[list[list[int]], int]:
    """Pages in shuffled order, as many to each sequence as asked, and one that is nobody's."""
    order = list(range(sum(counts) + 1))
    random.Random(sum(counts)).shuffle(order)
    return [[order.pop() for _ in range(count)] for count in counts], order[0]


def _shapes(make: Make) -> Iterator[Case]:
    """Heads and lengths: on and around a page's edge, and beyond the tiles and partitions of kernels."""
    heads = ((9, 3, 64), (32, 8, 128), (28, 4, 128), (4, 4, 64), (8, 1, 96), (4, 2, 80), (2, 1, 256))
    for query, kv, dim in heads:
        shape: dict[str, Any] = {"heads": query, "kv_heads": kv, "dim": dim}
        label = f"h{query}-kv{kv}-d{dim}"
        for context in (1, 15, 16, 17, 33):
            yield make(f"decode-{context}-{label}", [(1, context)], **shape)
        yield make(f"prefill-20-{label}", [(20, 20)], **shape)
        yield make(f"mixed-{label}", [(1, 33), (12, 12), (1, 1), (5, 48)], **shape)
        yield make(f"window-{label}", [(9, 40), (1, 64)], window=17, **shape)
        yield make(f"soft-cap-{label}", [(9, 40), (1, 64)], soft_cap=5.0, **shape)
    for context in (31, 32, 47, 48, 49, 64, 200, 512, 1000, 1500):
        yield make(f"decode-{context}", [(1, context)])
    yield make("decode-4100", [(1, 4100), (1, 4096)], heads=4, kv_heads=1)
    # More partitions of the keys than a kernel may have counted on, each with a share of the result.
    yield make("decode-70000", [(1, 70_000)], heads=2, kv_heads=1, page_size=64)
    for rows, length in ((2, 1500), (3, 2100), (8, 4099)):
        yield make(f"chunk-{rows}-of-{length}", [(rows, length)], heads=4, kv_heads=1)
    for rows in (1, 2, 3, 5, 8, 15, 16, 17, 40, 64, 128, 200):
        yield make(f"prefill-{rows}", [(rows, rows)])
    yield make("prefill-512", [(512, 512)], heads=4, kv_heads=2)
    yield make("prefill-1100", [(1100, 1100)], heads=2, kv_heads=1)
    for rows, length in ((7, 40), (16, 48), (1, 17), (33, 34), (2, 300), (150, 290)):
        yield make(f"chunk-{rows}-of-{length}", [(rows, length)])


def _batches(make: Make) -> Iterator[Case]:
    """Several sequences in one step: decoding, prefilling, waiting, empty, and padding rows."""
    for label, sequences in _BATCHES.items():
        yield make(label, sequences)
    yield make("batch-of-130", [(1, 1 + index) for index in range(130)], heads=4, kv_heads=2)
    yield make("all-empty", [(0, 0), (0, 0)], padding=2)
    for padding in (1, 2, 3, 6):
        yield make(f"padding-{padding}", [(2, 18), (1, 5)], padding=padding)


def _scores(make: Make) -> Iterator[Case]:
    """Windows, caps, scales and extremes."""
    for window in (1, 8, 16, 17, 40, 100):
        yield make(f"window-{window}", [(9, 40), (1, 64), (1, 3)], window=window)
    yield make("window-7", [(4, 40), (1, 64)], window=7)
    # Whole pages and tiles before the window: a maximum over nothing is -inf, and -inf from -inf is NaN.
    yield make("window-long", [(1, 300), (40, 200), (150, 150)], window=20)
    yield make("window-4096", [(1, 5000), (2, 4098)], heads=2, kv_heads=1, window=4096)
    yield from _chunked(make)
    for cap in (1.0, 5.0, 50.0):
        yield make(f"soft-cap-{cap:g}", [(4, 30), (1, 17)], soft_cap=cap)
    yield make("window-soft-cap", [(4, 30)], window=6, soft_cap=5.0)
    yield make("loud", [(3, 40)], loud=30.0)
    yield make("scale", [(3, 40)], scale=0.3)
    for label in extremes():
        yield make(label, [(3, 40), (1, 17)], spread=label)


def _chunked(make: Make) -> Iterator[Case]:
    """Chunks: rows at the first and the last position of one, over several, of tiles and pages in part."""
    for chunk in (1, 8, 16, 17, 40, 100):
        yield make(f"chunked-{chunk}", [(9, 40), (1, 64), (1, 3), (1, 65)], chunk=chunk)
    yield make("chunked-8192", [(1, 6000), (2, 9000)], heads=2, kv_heads=1, chunk=8192)
    yield make("chunked-at-the-edge", [(1, 32), (1, 33), (2, 33), (1, 34), (32, 64)], chunk=32)
    # Whole pages and tiles before the chunk: a maximum over nothing is -inf, and -inf from -inf is NaN.
    yield make("chunked-long", [(1, 300), (40, 200), (150, 150), (1, 1025)], chunk=128)
    for query, kv, dim in ((32, 8, 128), (8, 1, 96), (2, 1, 256)):
        shape: dict[str, Any] = {"heads": query, "kv_heads": kv, "dim": dim}
        yield make(f"chunked-h{query}-kv{kv}-d{dim}", [(9, 40), (1, 64)], chunk=17, **shape)
    for format in ("bf16", "f16", "fp8_row"):
        yield make(f"chunked-{format}", [(9, 40), (1, 64), (2, 0)], padding=2, chunk=17, format=format)
    yield make("chunked-window", [(9, 40), (1, 64)], chunk=17, window=6)
    yield make("chunked-soft-cap", [(4, 30)], chunk=7, soft_cap=5.0)
    yield make("chunked-sinks", [(9, 40), (1, 300)], chunk=17, sinks=True)
    yield make("chunked-unseen-nan", [(1, 90), (20, 41), (2, 0)], padding=2, chunk=17, unseen=True)


def _sunk(make: Make) -> Iterator[Case]:
    """Sinks: beside scores, far above and far below all, and where nothing is seen."""
    for query, kv, dim in ((9, 3, 64), (64, 8, 64), (8, 1, 96)):
        shape: dict[str, Any] = {"heads": query, "kv_heads": kv, "dim": dim, "sinks": True}
        for label, sequences in {**_STEPS, "long": [(1, 1500)]}.items():
            yield make(f"sinks-{label}-h{query}-kv{kv}-d{dim}", sequences, **shape)
    for format in ("bf16", "f16", "fp8_row"):
        yield make(f"sinks-{format}", [(9, 40), (1, 300), (2, 0)], padding=2, format=format, sinks=True)
    # A result that is rounded before the sink takes its share is rounded twice.
    for length in (13, 40, 100):
        yield make(f"sinks-bf16-decode-{length}", [(1, length)], format="bf16", sinks=True)
    yield make("sinks-window", [(9, 40), (1, 64), (40, 200)], window=17, sinks=True)
    yield make("sinks-window-soft-cap", [(4, 30), (1, 900)], window=6, soft_cap=5.0, sinks=True)
    yield make("sinks-no-length", [(1, 9), (2, 0), (0, 5)], padding=2, sinks=True)
    yield make("sinks-unseen-nan", [(1, 9), (3, 20), (7, 70)], padding=2, unseen=True, sinks=True)
    for level in (-200.0, -10.0, 20.0):
        yield make(f"sinks-at{level:+g}", [(3, 40), (1, 300)], sinks=True, level=level)


def _memory(make: Make) -> Iterator[Case]:
    """Pages: their sizes, the cache's formats, and what lies where no sequence has written."""
    for page_size in (1, 8, 32, 64, 256):
        yield make(f"pages-of-{page_size}", [(1, 70), (5, 64), (3, 3)], page_size=page_size)
    # Engines keep a table as wide as the longest context, and share the pages of a common prompt.
    yield make("wide-table", [(1, 70), (5, 64), (3, 3)], wider=5)
    yield make("wide-table-decode", [(1, 70), (1, 64), (1, 3)], wider=60)
    for pages in (1, 2):
        yield make(f"shared-{pages}", [(1, 50), (3, 70), (1, 33)], shared=pages)
        yield make(f"shared-{pages}-decode", [(1, 50), (1, 70), (1, 33), (1, 64)], shared=pages)
    yield make("far-pages", [(1, 40_000), (2, 70)], heads=2, kv_heads=1, page_size=1)
    for format in ("bf16", "f16", "fp8_row"):
        for label, sequences in _STEPS.items():
            yield make(f"{format}-{label}", sequences, format=format)
        yield make(f"{format}-window", [(9, 40), (1, 64)], window=17, format=format)
        yield make(f"{format}-soft-cap", [(9, 40), (1, 64)], soft_cap=5.0, format=format)
        yield make(f"{format}-padding", [(2, 18), (1, 5)], padding=3, format=format)
    for query, kv, dim in ((32, 8, 128), (4, 2, 80), (2, 1, 256)):
        shape: dict[str, Any] = {"heads": query, "kv_heads": kv, "dim": dim, "format": "fp8_row"}
        yield make(f"fp8_row-h{query}-kv{kv}-d{dim}", [(1, 33), (5, 48)], **shape)
    yield make("fp8_row-pages-of-64", [(1, 70), (5, 64)], page_size=64, format="fp8_row")
    yield make("fp8_row-unseen-nan", [(1, 9), (3, 20), (2, 0)], padding=2, unseen=True, format="fp8_row")
    # Pages that hold whole tiles of two-byte elements, as copy engines read them.
    for window in (0, 40):
        label, paged = f"-window-{window}" if window else "", [(1, 70), (150, 290), (2, 0)]
        yield make(
            f"bf16-unseen-nan-pages-of-256{label}", paged, page_size=256, window=window, unseen=True, format="bf16"
        )
    # Such memory may hold anything; weighed by zero, a NaN is still one.
    steps = ((1, 9), (3, 20), (2, 0), (1, 64), (0, 5), (7, 70), (0, 0))
    yield make("unseen-nan", steps, padding=2, unseen=True)
    yield make("unseen-nan-pages-of-32", steps, page_size=32, unseen=True)
    yield make("unseen-nan-window", [(1, 90), (20, 41)], window=17, unseen=True)


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
