"""rms_norm, add_rms_norm and qk_norm on CUDA: a row, or a head, a program of one Triton kernel.

The first two also quantise the norm where asked.
The sum and the norm are computed in float32 and rounded once, when they are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from kernelmux.contract import Kernel, Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_triton.launch import bind
from kernelmux_triton.rows import FLOATS, emitted, planes, reciprocal, scale_of, scaling, store_row, warps

LONGEST = 16384
"""Columns that a program keeps in registers; a longer row is read twice."""
TILE = 4096
"""Columns of a longer row that a program takes at a time."""


class RmsNorm(Kernel):
    """The sum of squares in float32."""

    ops: tuple[str, ...] = ("rms_norm",)
    name = "f32"
    precision = 1e-11
    packed = "f32"
    input_formats = FLOATS

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [emitted(node.outputs[0])]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        # Without a sum neither the second input nor the total is touched.
        a, b = (*tensors.inputs, *tensors.inputs)[:2]
        total, y = (a, *tensors.outputs)[-2:]
        m, k = a.shape
        kept = (node.epsilon, k, len(tensors.inputs) > 1, *scaling(node.outputs[-1].format, k))
        args = (a, b, total, *tensors.packed, *planes(y), *kept)
        if k > LONGEST:
            return bind(_norm_long, (m,), *args, TILE, stream=stream, num_warps=warps(TILE))
        wide = triton.next_power_of_2(k)
        return bind(_norm, (m,), *args, wide, stream=stream, num_warps=warps(wide))


class AddRmsNorm(RmsNorm):
    """The norm of the unrounded sum."""

    ops = ("add_rms_norm",)

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS, emitted(node.outputs[1])]


class QkNorm(Kernel):
    """Queries and keys in one launch; they may be columns of one matrix."""

    ops = ("qk_norm",)
    name = "f32"
    precision = 1e-11
    packed = "f32"
    strided = True
    input_formats = output_formats = FLOATS

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        q, k = tensors.inputs
        wide = triton.next_power_of_2(node.head_dim)
        sizes = (node.num_heads, node.num_kv_heads, node.head_dim, q.stride(0), k.stride(0))
        args = (q, k, *tensors.packed, *tensors.outputs, node.epsilon, *sizes, wide)
        grid = (len(q), node.num_heads + node.num_kv_heads)
        return bind(_heads_normed, grid, *args, stream=stream, num_warps=warps(wide))


@triton.jit
def _heads_normed(
    q, k, q_gamma, k_gamma, q_out, k_out,
    EPSILON: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """q [m, QUERIES, DIM] and k [m, KEYS, DIM] in rows Q_STRIDE and K_STRIDE apart; a program a head of either."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    if head < QUERIES:
        _head_normed(q + row * Q_STRIDE + head * DIM, q_gamma, q_out + (row * QUERIES + head) * DIM, EPSILON, DIM, WIDE)
    else:
        head -= QUERIES
        _head_normed(k + row * K_STRIDE + head * DIM, k_gamma, k_out + (row * KEYS + head) * DIM, EPSILON, DIM, WIDE)


@triton.jit
def _head_normed(x, gamma, y, EPSILON: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr):
    """x, gamma and y [DIM]."""
    column = tl.arange(0, WIDE)
    inside = column < DIM
    values = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, axis=0) / DIM + EPSILON) * tl.load(
        gamma + column, mask=inside, other=0.0
    )
    tl.store(y + column, values.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _norm(
    a, b, total, gamma, y, scales, sums,
    EPSILON: tl.constexpr, COLUMNS: tl.constexpr, ADD: tl.constexpr, GROUP: tl.constexpr, COLUMN_MAJOR: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """a, b, total, y [m, COLUMNS], gamma [COLUMNS] in float32; a program a row, which reads and writes it once."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDE)
    inside = column < COLUMNS
    share = tl.load(gamma + column, mask=inside, other=0.0)
    values = tl.load(a + row * COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(b + row * COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + row * COLUMNS + column, values.to(total.dtype.element_ty), mask=inside)
    values *= tl.rsqrt(tl.sum(values * values, axis=0) / COLUMNS + EPSILON) * share
    store_row(y, scales, sums, row, tl.num_programs(0), 0, values, COLUMNS, GROUP, COLUMN_MAJOR)


@triton.jit
def _norm_long(
    a, b, total, gamma, y, scales, sums,
    EPSILON: tl.constexpr, COLUMNS: tl.constexpr, ADD: tl.constexpr, GROUP: tl.constexpr, COLUMN_MAJOR: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The same in two passes, of which the second alone writes: the sum may lie where an input does."""
    # One scale for all of the row is known after the first pass, those of blocks when they are written.
    whole: tl.constexpr = GROUP > WIDE
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDE)
    squares = tl.zeros([WIDE], tl.float32)
    peaks = tl.zeros([WIDE], tl.float32)
    for start in range(0, COLUMNS, WIDE):
        at, inside = start + column, start + column < COLUMNS
        values = tl.load(a + row * COLUMNS + at, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            values += tl.load(b + row * COLUMNS + at, mask=inside, other=0.0).to(tl.float32)
        squares += values * values
        if whole:
            peaks = tl.maximum(peaks, tl.abs(values * tl.load(gamma + at, mask=inside, other=0.0)))
    factor = tl.rsqrt(tl.sum(squares, axis=0) / COLUMNS + EPSILON)
    scale = scale_of(tl.max(peaks, axis=0) * factor, y)
    if whole:
        tl.store(scales + row, scale)
    for start in range(0, COLUMNS, WIDE):
        at, inside = start + column, start + column < COLUMNS
        values = tl.load(a + row * COLUMNS + at, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            values += tl.load(b + row * COLUMNS + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(total + row * COLUMNS + at, values.to(total.dtype.element_ty), mask=inside)
        values *= factor * tl.load(gamma + at, mask=inside, other=0.0)
        if whole:
            store_row(y, scales, sums, row, 0, start, values * reciprocal(scale), COLUMNS, 0, False)
        else:
            store_row(y, scales, sums, row, tl.num_programs(0), start, values, COLUMNS, GROUP, COLUMN_MAJOR)
