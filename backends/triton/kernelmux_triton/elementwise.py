"""add, mul, silu and swiglu on CUDA: one Triton kernel, which also quantises what swiglu gives where asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
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


class _Elementwise(Kernel):
    """In float32, rounded once."""

    name = "f32"
    precision = 1e-11

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS for _ in node.inputs]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        # Of one input the second is the first: it is not read.
        a, b = (*tensors.inputs, *tensors.inputs)[:2]
        return _bind(node.op, a, b, tensors.outputs[0], node.outputs[0].format, stream)


class Add(_Elementwise):
    ops = ("add",)


class Mul(_Elementwise):
    ops = ("mul",)


class Silu(_Elementwise):
    ops = ("silu",)


class Swiglu(_Elementwise):
    """Gate and up may be columns of one matrix."""

    ops = ("swiglu",)
    strided = True

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [emitted(node.outputs[-1], LONGEST)]


def _bind(op: str, a: torch.Tensor, b: torch.Tensor, y: Any, format: str, stream: Any) -> Launch:
    m, n = a.shape
    group, column_major = scaling(format, n)
    wide = max(group, min(TILE, triton.next_power_of_2(n)))
    args = (a, b, *planes(y), op, a.stride(0), b.stride(0), n, group, column_major, wide)
    return bind(_elementwise, (m, triton.cdiv(n, wide)), *args, stream=stream, num_warps=warps(wide))


@triton.jit
def _elementwise(
    a,
    b,
    y,
    scales,
    sums,
    OP: tl.constexpr,
    STRIDE: tl.constexpr,
    OTHER: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMN_MAJOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """a, b [m, COLUMNS] in rows STRIDE and OTHER apart, y [m, COLUMNS]; a program takes WIDE columns of a row, once."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * WIDE
    column = first + tl.arange(0, WIDE)
    values = tl.load(a + row * STRIDE + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    if OP == "silu" or OP == "swiglu":
        values = values / (1.0 + tl.exp(-values))
    if OP != "silu":
        other = tl.load(b + row * OTHER + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
        if OP == "add":
            values += other
        else:
            values *= other
    store_row(y, scales, sums, row, tl.num_programs(0), first, values, COLUMNS, GROUP, COLUMN_MAJOR)
