"""Products of rows with the matrices of their experts; W [experts * n, k] as few_rows_kernels.py states WEIGHT.

A place is one expert of one row: top_k a row, in order. `one_place` is for few; of many, `group` lists the places of
each expert, and `grouped` multiplies them, so that an expert's rows of W are read once for all that have it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernelmux_triton.few_rows_kernels import affine


@triton.jit
def _numbers(w, scales, pairs, row, at, there, k, WEIGHT: tl.constexpr):
    """W's numbers of rows `row` and columns `at`, [rows, columns], in float32."""
    if WEIGHT == "dense":
        numbers = tl.load(w + row[:, None] * k + at[None, :], mask=there, other=0.0).to(tl.float32)
    else:
        numbers, minimum = affine(scales, pairs, row[:, None], (at // 32)[None, :], there, k // 32, WEIGHT)
        if WEIGHT == "q8_0":
            numbers *= tl.load(w + row[:, None] * k + at[None, :], mask=there, other=0).to(tl.float32)
        else:
            byte = (at // 32) * 16 + at % 16
            stored = tl.load(w + row[:, None] * (k // 2) + byte[None, :], mask=there, other=0)
            nibbles = tl.where((at % 32 < 16)[None, :], stored & 15, stored >> 4)
            numbers = numbers * nibbles.to(tl.float32) + minimum
    return numbers


@triton.jit(do_not_specialize=["m"])
def one_place(
    x, ids, w, scales, pairs, bias, y, m, n, k,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (tile, place): TALL rows of the place's expert, all columns, WIDE at a time, added in float32.

    x [m, k] where SHARED, else [m * TOP_K, k]; y [m * TOP_K, n].
    """
    place = tl.program_id(1).to(tl.int64)
    own = tl.program_id(0) * TALL + tl.arange(0, TALL)
    row = tl.load(ids + place).to(tl.int64) * n + own
    x_row = place // TOP_K if SHARED else place
    acc = tl.zeros([TALL, WIDE], tl.float32)
    for start in range(0, k, WIDE):
        at = start + tl.arange(0, WIDE)
        there = (own < n)[:, None] & (at < k)[None, :]
        values = tl.load(x + x_row * k + at, mask=at < k, other=0.0).to(tl.float32)
        acc += _numbers(w, scales, pairs, row, at, there, k, WEIGHT) * values[None, :]
    total = tl.sum(acc, axis=1)
    if BIAS:
        total += tl.load(bias + row, mask=own < n, other=0.0)
    tl.store(y + place * n + own, total.to(y.dtype.element_ty), mask=own < n)


@triton.jit(do_not_specialize=["places"])
def group(ids, order, counts, places, TILE: tl.constexpr):
    """Program (expert): the places that have it, in order, to order [experts, places], and how many to counts."""
    expert = tl.program_id(0)
    found = 0
    for start in range(0, places, TILE):
        place = start + tl.arange(0, TILE)
        mine = tl.load(ids + place, mask=place < places, other=-1) == expert
        upto = tl.cumsum(mine.to(tl.int32), axis=0)
        tl.store(order + expert * places + found + upto - 1, place, mask=mine)
        found += tl.sum(mine.to(tl.int32), axis=0)
    tl.store(counts + expert, found)


@triton.jit(do_not_specialize=["places"])
def grouped(
    x, order, counts, w, scales, pairs, bias, y, places, n, k,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (tile, expert): TALL rows of an expert by all places that have it, ROWS at a time, on tensor cores.

    Dense W multiplies in its own type, blocks in bfloat16.
    """
    expert = tl.program_id(1)
    own = tl.program_id(0) * TALL + tl.arange(0, TALL)
    row = expert.to(tl.int64) * n + own
    count = tl.load(counts + expert)
    for first in range(0, count, ROWS):
        at_place = first + tl.arange(0, ROWS)
        there = at_place < count
        place = tl.load(order + expert * places + at_place, mask=there, other=0).to(tl.int64)
        x_row = place // TOP_K if SHARED else place
        acc = tl.zeros([TALL, ROWS], tl.float32)
        for start in range(0, k, WIDE):
            at = start + tl.arange(0, WIDE)
            inside = (own < n)[:, None] & (at < k)[None, :]
            values = tl.load(x + x_row[:, None] * k + at[None, :], mask=there[:, None] & (at < k)[None, :], other=0.0)
            if WEIGHT == "dense":
                numbers = tl.load(w + row[:, None] * k + at[None, :], mask=inside, other=0.0)
            else:
                numbers = _numbers(w, scales, pairs, row, at, inside, k, WEIGHT).to(tl.bfloat16)
            acc = tl.dot(numbers, tl.trans(values.to(numbers.dtype)), acc, input_precision="ieee")
        if BIAS:
            acc += tl.load(bias + row, mask=own < n, other=0.0)[:, None]
        target = y + place[None, :] * n + own[:, None]
        tl.store(target, acc.to(y.dtype.element_ty), mask=(own < n)[:, None] & there[None, :])
