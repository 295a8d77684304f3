"""attention on CUDA where the cache lies: each row's positions split over programs, then put together.

The query heads that share a kv head are rows of one product on tensor cores, so that keys and values are read once.
Nothing on the host is read: lengths and pages may change between replays of a graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Declined, Kernel, Launch, Tensors
from kernelmux_torch.cuda.launch import bind
from kernelmux_torch.elementwise import FLOATS

PROGRAMS = 264
"""Programs that a launch should have at least: two a multiprocessor of an H100."""
SPLITS = 32
"""Parts of a row's positions at most; more cost more to put together than they save."""
POSITIONS = 32
"""Positions that a program reads at a time."""

LOG2E = tl.constexpr(math.log2(math.e))
FAR = tl.constexpr(2**31 - 1)


def offer(node: TensorNode, cache_format: str) -> Kernel | Declined:
    """The kernel for a cache's format, or why not."""
    formats = {value.format for value in node.inputs[1:3]}
    if len(formats) > 1 or cache_format not in FLOATS:
        stored = " and ".join(sorted(formats))
        return Declined(f"it reads caches in one of {', '.join(FLOATS)}, not {stored}", "format", Paged.name)
    if node.head_dim > 256:
        return Declined(f"it keeps heads of up to 256 in registers, not {node.head_dim}", "shape", Paged.name)
    return Paged() if cache_format == "f32" else HalfPaged()


class Paged(Kernel):
    """Float32 throughout: sums of products on the ordinary cores."""

    name = "paged"
    precision = 1e-9
    launches = 2

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        # The product is in the cache's format.
        return [[node.inputs[1].format], *([value.format] for value in node.inputs[1:])]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS]

    def workspace(self, node: TensorNode) -> int:
        # A part's largest score, sum of weights, and weighted values.
        return 4 * node.inputs[0].extents[0] * node.num_heads * _splits(node) * (2 + node.head_dim)

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        q, k_cache, v_cache, starts, lengths, table = tensors.inputs
        assert tensors.workspace is not None
        splits, parts = _splits(node), len(q) * node.num_heads * _splits(node)
        scratch = tensors.workspace.view(torch.float32)
        peaks, sums, mixed = scratch[:parts], scratch[parts : 2 * parts], scratch[2 * parts :]
        group, wide = node.num_heads // node.num_kv_heads, triton.next_power_of_2(node.head_dim)
        args = (q, k_cache, v_cache, starts, lengths, table, peaks, sums, mixed, len(lengths), table.stride(0))
        args += (node.scale, node.soft_cap, node.window, k_cache.shape[1], node.num_kv_heads, group, node.head_dim)
        # A product on tensor cores takes sixteen rows, and sixteen columns, at least.
        sizes = (triton.next_power_of_2(len(lengths)), max(16, triton.next_power_of_2(group)), max(16, wide), POSITIONS)
        attend = bind(_attend, (len(q), node.num_kv_heads, splits), *args, splits, *sizes, num_warps=4)
        shape = (node.num_heads, node.head_dim, splits, triton.next_power_of_2(splits), wide)
        join = bind(_join, (len(q), node.num_heads), peaks, sums, mixed, *tensors.outputs, *shape, num_warps=4)

        def launch() -> None:
            attend()
            join()

        return launch


class HalfPaged(Paged):
    """Products in the cache's 16-bit format on tensor cores, sums in float32."""

    precision = 2e-5


def _splits(node: TensorNode) -> int:
    """Parts of each row's positions, by the rows alone: a captured launch keeps them whatever the lengths become."""
    return max(1, min(SPLITS, PROGRAMS // (node.inputs[0].extents[0] * node.num_kv_heads)))


@triton.jit(do_not_specialize=["seqs", "stride"])
def _attend(
    q,
    k_cache,
    v_cache,
    starts,
    lengths,
    table,
    peaks,
    sums,
    mixed,
    seqs,
    stride,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    SEQS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    TALL: tl.constexpr,
):
    """One row, the query heads of one kv head, one part of the positions."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # The row's sequence is behind all those that end before it; a row of none is behind the last.
    candidate = tl.arange(0, SEQS)
    ends = tl.load(starts + 1 + candidate, mask=candidate < seqs, other=FAR)
    seq = tl.sum((ends <= row).to(tl.int32), axis=0)
    length = tl.load(lengths + seq, mask=seq < seqs, other=0)
    end = tl.load(starts + 1 + seq, mask=seq < seqs, other=0)
    # Rows are a sequence's last positions. Of length 0, or of no sequence, nothing is seen.
    seen = tl.where(length > 0, length - (end - row) + 1, 0)
    oldest = 0
    if WINDOW:
        oldest = tl.maximum(seen - WINDOW, 0)
    share = tl.cdiv(tl.cdiv(seen - oldest, SPLITS), TALL) * TALL
    begin = oldest + split * share
    stop = tl.minimum(begin + share, seen)

    head, dim = tl.arange(0, ROWS), tl.arange(0, WIDE)
    heads = row.to(tl.int64) * NUM_KV_HEADS * GROUP + kv_head * GROUP + head
    within = (head < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    queries = tl.load(q + heads[:, None] * HEAD_DIM + dim[None, :], mask=within, other=0.0)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    values = tl.zeros([ROWS, WIDE], tl.float32)
    for start in range(begin, stop, TALL):
        position = start + tl.arange(0, TALL)
        there = position < stop
        page = tl.load(table + seq * stride + position // PAGE_SIZE, mask=there, other=0).to(tl.int64)
        at = ((page * PAGE_SIZE + position % PAGE_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM
        stored = there[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(k_cache + at[:, None] + dim[None, :], mask=stored, other=0.0)
        v = tl.load(v_cache + at[:, None] + dim[None, :], mask=stored, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
        if SOFT_CAP:
            # c tanh(s / c), from an exponential that may overflow: then the fraction is 0.
            scores = SOFT_CAP * LOG2E * (1 - 2 / (1 + tl.exp(scores * (2 * SCALE / SOFT_CAP))))
        else:
            scores = scores * (SCALE * LOG2E)
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        values = values * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        peak = higher
    part = heads * SPLITS + split
    tl.store(peaks + part, peak, mask=head < GROUP)
    tl.store(sums + part, total, mask=head < GROUP)
    if begin < stop:
        tl.store(mixed + part[:, None] * HEAD_DIM + dim[None, :], values, mask=within)


@triton.jit
def _join(
    peaks,
    sums,
    mixed,
    y,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One head of one row: its parts, each weighed by its largest score. A part without positions left no values."""
    head = tl.program_id(0).to(tl.int64) * NUM_HEADS + tl.program_id(1)
    split, dim = tl.arange(0, PARTS), tl.arange(0, WIDE)
    part = head * SPLITS + split
    peak = tl.load(peaks + part, mask=split < SPLITS, other=float("-inf"))
    there = peak != float("-inf")
    highest = tl.max(peak, axis=0)
    weights = tl.where(there, tl.exp2(peak - tl.where(highest == float("-inf"), 0.0, highest)), 0.0)
    total = tl.sum(weights * tl.load(sums + part, mask=split < SPLITS, other=0.0), axis=0)
    inside = there[:, None] & (dim < HEAD_DIM)[None, :]
    values = tl.load(mixed + part[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0)
    joined = tl.sum(values * weights[:, None], axis=0) / tl.where(total == 0, 1.0, total)
    tl.store(y + head * HEAD_DIM + dim, joined.to(y.dtype.element_ty), mask=dim < HEAD_DIM)
