"""Elementwise ops on CUDA: one Triton kernel, which also quantises what swiglu gives where asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from kernelmux.contract import Kernel, Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_triton.launch import bind
from kernelmux_triton.rows import FLOATS, emitted, planes, scaling, store_row, warps

TILE = 1024
"""Columns that a program takes where no scale of the whole row is wanted."""
LONGEST = 32768
"""Columns of a row that a program keeps in registers: fp8_row is written of no longer ones."""


class Elementwise(Kernel):
    """In float32, rounded once."""

    ops: tuple[str, ...] = ("add", "mul", "scale", "silu", "gelu", "soft_cap")
    name = "f32"
    precision = 1e-11
    input_formats = output_formats = FLOATS

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        # Of one input the second is the first: it is not read.
        a, b = (*tensors.inputs, *tensors.inputs)[:2]
        m, n = a.shape
        group, column_major = scaling(node.outputs[0].format, n)
        wide = max(group, min(TILE, triton.next_power_of_2(n)))
        number = node.scale or node.soft_cap or node.limit
        laid = (a.stride(0), b.stride(0), n, group, column_major, wide)
        args = (a, b, *planes(tensors.outputs[0]), node.op, number, node.alpha, *laid)
        return bind(_elementwise, (m, triton.cdiv(n, wide)), *args, stream=stream, num_warps=warps(wide))


class Swiglu(Elementwise):
    """Gate and up may be columns of one matrix."""

    ops = ("swiglu",)
    strided = True

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [emitted(node.outputs[-1], LONGEST)]


class ClampedSwiglu(Elementwise):
    """Of gates far below zero the exponential has the error of alpha times the gate, rounded: six millionths."""

    ops = ("clamped_swiglu",)
    precision = 5e-11


class Temper(Kernel):
    """In float32, rounded once."""

    ops = ("temper",)
    name = "f32"
    precision = 1e-11
    input_formats = output_formats = FLOATS

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS, ["i32"]]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (x, positions), (y,) = tensors.inputs, tensors.outputs
        m, n = x.shape
        wide = min(TILE, triton.next_power_of_2(n))
        args = (x, positions, y, node.scale, node.span, n, wide)
        return bind(_temper, (m, triton.cdiv(n, wide)), *args, stream=stream, num_warps=warps(wide))


@triton.jit
def _temper(
    x, positions, y,
    SCALE: tl.constexpr, SPAN: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x, y [m, COLUMNS]; a program takes WIDE columns of a row. The floor is a division of whole numbers."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    passed = (tl.load(positions + row) + 1) // SPAN
    factor = 1.0 + SCALE * tl.log(1.0 + passed.to(tl.float32))
    at = row * COLUMNS + column
    values = tl.load(x + at, mask=column < COLUMNS, other=0.0).to(tl.float32)
    tl.store(y + at, (values * factor).to(y.dtype.element_ty), mask=column < COLUMNS)


@triton.jit
def _elementwise(
    a, b, y, scales, sums,
    OP: tl.constexpr, NUMBER: tl.constexpr, ALPHA: tl.constexpr, STRIDE: tl.constexpr, OTHER: tl.constexpr,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, COLUMN_MAJOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """a, b [m, COLUMNS] in rows STRIDE and OTHER apart, y [m, COLUMNS]; a program takes WIDE columns of a row, once.

    NUMBER is what scale, soft_cap or the limits of clamped_swiglu are; ALPHA is the latter's too.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * WIDE
    column = first + tl.arange(0, WIDE)
    values = tl.load(a + row * STRIDE + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    if OP == "clamped_swiglu":
        values = tl.minimum(values, NUMBER)
        values = values / (1.0 + tl.exp(-ALPHA * values))
    if OP == "silu" or OP == "swiglu":
        values = values / (1.0 + tl.exp(-values))
    if OP == "gelu":
        # (1 + tanh(u)) / 2 is the sigmoid of 2u; the factor is twice the root of 2 / pi.
        inner = 1.5957691216057308 * (values + 0.044715 * values * values * values)
        values = values / (1.0 + tl.exp(-inner))
    if OP == "scale":
        values *= NUMBER
    if OP == "soft_cap":
        values = NUMBER * tanh(values / NUMBER)
    if OP == "add" or OP == "mul" or OP == "swiglu" or OP == "clamped_swiglu":
        other = tl.load(b + row * OTHER + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
        if OP == "clamped_swiglu":
            other = tl.minimum(tl.maximum(other, -NUMBER), NUMBER) + 1.0
        if OP == "add":
            values += other
        else:
            values *= other
    store_row(y, scales, sums, row, tl.num_programs(0), first, values, COLUMNS, GROUP, COLUMN_MAJOR)


@triton.jit
def tanh(x):
    """By the sigmoid, and near 0, where that cancels, by its series up to x⁷."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.25, series, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x)))
