"""rms_norm and add_rms_norm on CUDA: a row a program of one Triton kernel, which also quantises the norm where asked.

The sum and the norm are computed in float32 and rounded once, when they are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kernelmux.device import Device
from kernelmux.formats import Weight, as_tuple
from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Kernel, Launch, Tensors
from kernelmux_triton.launch import bind
from kernelmux_triton.rows import FLOATS, LARGEST, TINY, WRITTEN, store_row, warps

LONGEST = 16384
"""Columns that a program keeps in registers; a longer row is read twice."""
TILE = 4096
"""Columns of a longer row that a program takes at a time."""


class RmsNorm(Kernel):
    """The sum of squares in float32."""

    name = "f32"
    precision = 1e-11
    packed = "f32"

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [WRITTEN]

    def packed_bytes(self, node: TensorNode) -> int:
        return 4 * node.gamma[0].extents[0]

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        return (weights[0].dequantize().to(device.torch),)

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (x,), (y,), (gamma,) = tensors.inputs, tensors.outputs, tensors.packed
        return _bind(x, x, x, gamma, y, node.epsilon, add=False)


class AddRmsNorm(RmsNorm):
    """The norm of the unrounded sum."""

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS, FLOATS]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS, WRITTEN]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (a, b), (total, y), (gamma,) = tensors.inputs, tensors.outputs, tensors.packed
        return _bind(a, b, total, gamma, y, node.epsilon, add=True)


def _bind(a: Any, b: Any, total: Any, gamma: Any, y: Any, epsilon: float | None, add: bool) -> Launch:
    """Unless `add`, neither `b` nor `total` is touched."""
    data, *scales = as_tuple(y)
    m, k = a.shape
    args = (a, b, total, gamma, data, scales[0] if scales else data, epsilon, k, add, bool(scales))
    if k > LONGEST:
        return bind(_norm_long, (m,), *args, TILE, num_warps=warps(TILE))
    wide = triton.next_power_of_2(k)
    return bind(_norm, (m,), *args, wide, num_warps=warps(wide))


@triton.jit
def _norm(
    a,
    b,
    total,
    gamma,
    y,
    scales,
    EPSILON: tl.constexpr,
    COLUMNS: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDE)
    inside = column < COLUMNS
    share = tl.load(gamma + column, mask=inside, other=0.0)
    values = tl.load(a + row * COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(b + row * COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + row * COLUMNS + column, values.to(total.dtype.element_ty), mask=inside)
    values *= tl.rsqrt(tl.sum(values * values, axis=0) / COLUMNS + EPSILON) * share
    store_row(y, scales, row, values, column, COLUMNS, SCALED)


@triton.jit
def _norm_long(
    a,
    b,
    total,
    gamma,
    y,
    scales,
    EPSILON: tl.constexpr,
    COLUMNS: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The same in two passes, of which the second alone writes: the sum may lie where an input does."""
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
        if SCALED:
            peaks = tl.maximum(peaks, tl.abs(values * tl.load(gamma + at, mask=inside, other=0.0)))
    factor = tl.rsqrt(tl.sum(squares, axis=0) / COLUMNS + EPSILON)
    scale = tl.div_rn(tl.max(peaks, axis=0) * factor, LARGEST)
    if SCALED:
        tl.store(scales + row, scale)
    for start in range(0, COLUMNS, WIDE):
        at, inside = start + column, start + column < COLUMNS
        values = tl.load(a + row * COLUMNS + at, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            values += tl.load(b + row * COLUMNS + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(total + row * COLUMNS + at, values.to(total.dtype.element_ty), mask=inside)
        values *= factor * tl.load(gamma + at, mask=inside, other=0.0)
        if SCALED:
            values *= tl.div_rn(1.0, tl.maximum(scale, TINY))
        tl.store(y + row * COLUMNS + at, values.to(y.dtype.element_ty), mask=inside)
