"""silu and swiglu on CUDA: one Triton kernel, which also quantises the result where asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kernelmux.formats import as_tuple
from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Kernel, Launch, Tensors
from kernelmux_triton.launch import bind
from kernelmux_triton.rows import FLOATS, WRITTEN, store_row, warps

TILE = 1024
"""Columns that a program takes where no scale of the row is wanted."""
LONGEST = 32768
"""Columns of a row that a program keeps in registers: fp8_row is written of no longer ones."""


class Silu(Kernel):
    """In float32, rounded once."""

    name = "f32"
    precision = 1e-11

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [swiglu_formats(node)]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (x,), (y,) = tensors.inputs, tensors.outputs
        return bind_swiglu(x, None, y)


class Swiglu(Kernel):
    """silu(gate) * up in float32, rounded once."""

    name = "f32"
    precision = 1e-11

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS, FLOATS]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [swiglu_formats(node)]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (gate, up), (y,) = tensors.inputs, tensors.outputs
        return bind_swiglu(gate, up, y)


def swiglu_formats(node: TensorNode) -> Sequence[str]:
    return WRITTEN if node.outputs[0].shape[-1] <= LONGEST else FLOATS


def bind_swiglu(gate: torch.Tensor, up: torch.Tensor | None, y: Any) -> Launch:
    """`gate` and `up` may be halves of wider rows; without `up` the silu of `gate` is all."""
    data, *scales = as_tuple(y)
    m, n = gate.shape
    wide = triton.next_power_of_2(n) if scales else min(TILE, triton.next_power_of_2(n))
    others = (gate if up is None else up, data, scales[0] if scales else data)
    args = (gate, *others, gate.stride(0), n, up is not None, bool(scales), wide)
    return bind(_swiglu, (m, triton.cdiv(n, wide)), *args, num_warps=warps(wide))


@triton.jit
def _swiglu(
    gate,
    up,
    y,
    scales,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    MULTIPLIED: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    g = tl.load(gate + row * STRIDE + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    values = g / (1.0 + tl.exp(-g))
    if MULTIPLIED:
        values *= tl.load(up + row * STRIDE + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    store_row(y, scales, row, values, column, COLUMNS, SCALED)
