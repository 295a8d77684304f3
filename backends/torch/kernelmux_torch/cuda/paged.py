"""attention on CUDA in Triton, which reads lengths and pages on the device: any mixture of rows, in a graph too.

The positions that a row sees are cut into splits, which programs attend to at once; a second kernel weighs what they
found. Made for decoding: each row reads its keys and values by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kernelmux.formats import lookup
from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Kernel, Launch, Tensors
from kernelmux_torch.elementwise import FLOATS
from kernelmux_triton.launch import bind

PROGRAMS = 264
"""Programs that keep an H100 busy: two on each of its 132 multiprocessors."""
SPLITS = 64
"""Splits at most."""
TILE = 16384
"""Bytes of keys that a program loads at once, and of values; three tiles of both fit in shared memory."""
SEQUENCES = 128
"""Sequences that are looked through at once for a row's own."""


LOG2E = tl.constexpr(1.4426950408889634)


def offer(cache_format: str) -> Kernel:
    """The kernel for a cache of that format."""
    return Paged() if cache_format == "f32" else PagedHalf()


class Paged(Kernel):
    """Sums in float32, queries that share a kv head together."""

    name = "paged"
    precision = 1e-9
    launches = 2

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS, *([value.format] for value in node.inputs[1:])]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS]

    def workspace(self, node: TensorNode) -> int:
        m = node.inputs[0].extents[0]
        splits = _splits(m, node.num_kv_heads)
        # Of each split the weighted values, the largest score and the sum of weights.
        return 4 * m * node.num_heads * splits * (node.head_dim + 2) if splits > 1 else 0

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        q, k_cache, v_cache, query_start, kv_len, block_table = tensors.inputs
        (y,) = tensors.outputs
        m, dim, heads, kv_heads = len(q), node.head_dim, node.num_heads, node.num_kv_heads
        splits, wide = _splits(m, kv_heads), triton.next_power_of_2(dim)
        found, weights = y, y
        if splits > 1:
            assert tensors.workspace is not None
            rows = m * heads * splits
            found, weights = tensors.workspace.view(torch.float32).split([rows * dim, rows * 2])
        caches = (k_cache, v_cache, query_start, kv_len, block_table, len(kv_len), block_table.stride(0))
        fields = (node.scale, node.soft_cap or 0.0, node.window or 0, heads, kv_heads, dim, k_cache.shape[1])
        tall = max(16, triton.next_power_of_2(heads // kv_heads))
        many = max(16, TILE // (wide * lookup(node.inputs[1].format).dtype.itemsize))
        shape = (wide, tall, many, SEQUENCES, splits == 1, q.dtype != k_cache.dtype)
        attend = bind(_attend, (m, kv_heads, splits), q, found, weights, *caches, *fields, *shape, num_warps=4)
        if splits == 1:
            return attend
        weigh = bind(_weigh, (m * heads,), found, weights, y, dim, wide, splits, num_warps=4)

        def launch() -> None:
            attend()
            weigh()

        return launch


class PagedHalf(Paged):
    """The same, with weights rounded to the cache's two bytes before they meet the values."""

    precision = 1e-5


def _splits(m: int, kv_heads: int) -> int:
    """A power of two, so that few kernels are compiled: as many splits as the device has room for, by the rows."""
    room = max(1, PROGRAMS // (m * kv_heads))
    return min(SPLITS, 1 << (room.bit_length() - 1))


@triton.jit(do_not_specialize=["sequences", "width"])
def _attend(
    q,
    found,
    weights,
    k_cache,
    v_cache,
    query_start,
    kv_len,
    block_table,
    sequences,
    width,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WIDE: tl.constexpr,
    TALL: tl.constexpr,
    MANY: tl.constexpr,
    SEQUENCES: tl.constexpr,
    WHOLE: tl.constexpr,
    LOW: tl.constexpr,
):
    """One row's queries of one kv head against one split of what they see; `WHOLE` where there is but one split."""
    group: tl.constexpr = HEADS // KV_HEADS
    row, kv_head, split, splits = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    sequence, begin, end = _seen(row, query_start, kv_len, sequences, WINDOW, SEQUENCES)
    share = tl.cdiv(tl.cdiv(end - begin, splits), MANY) * MANY
    first = begin + split * share
    last = tl.minimum(first + share, end)

    member, column = tl.arange(0, TALL), tl.arange(0, WIDE)
    kept = (member < group)[:, None] & (column < DIM)[None, :]
    head = row.to(tl.int64) * HEADS + kv_head * group + member
    queries = tl.load(q + head[:, None] * DIM + column[None, :], mask=kept, other=0.0).to(tl.float32)
    high = queries.to(k_cache.dtype.element_ty)
    low = (queries - high.to(tl.float32)).to(k_cache.dtype.element_ty)

    peak = tl.full([TALL], float("-inf"), tl.float32)
    total = tl.zeros([TALL], tl.float32)
    sums = tl.zeros([TALL, WIDE], tl.float32)
    for start in range(first, last, MANY):
        position = start + tl.arange(0, MANY)
        inside = position < last
        page = tl.load(block_table + sequence * width + position // PAGE, mask=inside, other=0).to(tl.int64)
        slot = page * PAGE + position % PAGE
        at = (slot[:, None] * KV_HEADS + kv_head) * DIM + column[None, :]
        valid = inside[:, None] & (column < DIM)[None, :]
        keys = tl.trans(tl.load(k_cache + at, mask=valid, other=0.0))
        scores = tl.dot(high, keys, input_precision="ieee")
        if LOW:
            # What queries of another type have beyond the cache's.
            scores += tl.dot(low, keys, input_precision="ieee")
        scores *= SCALE
        if CAP > 0:
            scores = CAP - 2 * CAP / (tl.exp(2 / CAP * scores) + 1)
        scores = tl.where(inside[None, :], scores * LOG2E, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        faded = tl.exp2(peak - higher)
        each = tl.exp2(scores - higher[:, None])
        values = tl.load(v_cache + at, mask=valid, other=0.0)
        total = total * faded + tl.sum(each, axis=1)
        sums = tl.dot(each.to(values.dtype), values, sums * faded[:, None], input_precision="ieee")
        peak = higher

    if WHOLE:
        # Where nothing is seen the sums are zeros, and so is the result.
        mixed = sums / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(found + head[:, None] * DIM + column[None, :], mixed.to(found.dtype.element_ty), mask=kept)
    else:
        at = head * splits + split
        if first < last:
            tl.store(found + at[:, None] * DIM + column[None, :], sums, mask=kept)
        tl.store(weights + 2 * at, peak, mask=member < group)
        tl.store(weights + 2 * at + 1, total, mask=member < group)


@triton.jit
def _seen(row, query_start, kv_len, sequences, WINDOW: tl.constexpr, SEQUENCES: tl.constexpr):
    """A row's sequence, and the range of positions that it sees: none where it is of no sequence."""
    before = 0
    for start in range(0, sequences, SEQUENCES):
        index = start + tl.arange(0, SEQUENCES)
        there = index < sequences
        ends = tl.load(query_start + 1 + index, mask=there, other=0)
        before += tl.sum((there & (ends <= row)).to(tl.int32), axis=0)
    known = (before < sequences) & (row >= tl.load(query_start))
    sequence = tl.minimum(before, sequences - 1)
    end = tl.load(kv_len + sequence) - (tl.load(query_start + sequence + 1) - 1 - row)
    end = tl.where(known, tl.maximum(end, 0), 0)
    begin = tl.maximum(end - WINDOW, 0) if WINDOW > 0 else 0
    return sequence.to(tl.int64), begin, end


@triton.jit
def _weigh(found, weights, y, DIM: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr):
    """One row's one head from its splits; what those that saw nothing hold is not read."""
    head = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, SPLITS), tl.arange(0, WIDE)
    at = head * SPLITS + split
    peaks = tl.load(weights + 2 * at)
    totals = tl.load(weights + 2 * at + 1)
    saw = totals != 0
    # Finite where nobody saw anything.
    highest = tl.max(tl.where(saw, peaks, -3e38), axis=0)
    share = tl.where(saw, tl.exp2(peaks - highest), 0.0)
    total = tl.sum(share * totals, axis=0)
    kept = saw[:, None] & (column < DIM)[None, :]
    sums = tl.load(found + at[:, None] * DIM + column[None, :], mask=kept, other=0.0)
    mixed = tl.sum(sums * share[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(y + head * DIM + column, mixed.to(y.dtype.element_ty), mask=column < DIM)
