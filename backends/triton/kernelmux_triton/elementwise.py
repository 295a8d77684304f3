"""silu and swiglu on CUDA in one Triton kernel, and gate_up_swiglu as one GEMM of both weights before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from kernelmux.device import Device
from kernelmux.formats import Weight, as_tuple
from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Declined, Kernel, Launch, Tensors
from kernelmux_torch import fp8
from kernelmux_torch.cuda import mul_mat
from kernelmux_triton.launch import bind
from kernelmux_torch.cuda.rows import WRITTEN, store_row, warps
from kernelmux_torch.elementwise import FLOATS
from kernelmux_torch.weights import stacked

TILE = 1024
"""Columns that a program takes where no scale of the row is wanted."""
LONGEST = 32768
"""Columns of a row that a program keeps in registers: fp8_row is written of no longer ones."""


def offer_gate_up(n: int, k: int, bias: bool, device: Device) -> list[Kernel | Declined]:
    """gate_up_swiglu under the names of the mul_mats that it may stand for, or why not."""
    kernels = (GateUpBf16(), GateUpFp8Row(), GateUpFp8RowFast())
    if bias:
        return [Declined("its GEMM of both weights adds no biases", "unsupported", kernel.name) for kernel in kernels]
    bf16, *scaled = kernels
    return [bf16, *(kernel.refusal(n, k, bias, device) or kernel for kernel in scaled)]


class Silu(Kernel):
    """In float32, rounded once."""

    name = "f32"
    precision = 1e-11

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [_written(node)]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (x,), (y,) = tensors.inputs, tensors.outputs
        return _bind(x, None, y)


class Swiglu(Kernel):
    """silu(gate) * up in float32, rounded once."""

    name = "f32"
    precision = 1e-11

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS, FLOATS]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [_written(node)]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (gate, up), (y,) = tensors.inputs, tensors.outputs
        return _bind(gate, up, y)


class _GateUp(Kernel):
    """Over a mul_mat of the stacked weights [2n, k], whose results are rounded to bfloat16 (float16 ends at 65504)."""

    launches = mul_mat.SPLIT + 1

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [_written(node)]

    def workspace(self, node: TensorNode) -> int:
        m, n = node.outputs[0].extents
        return 2 * m * 2 * n

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (y,), (m, n) = tensors.outputs, node.outputs[0].extents
        assert tensors.workspace is not None
        both = tensors.workspace.view(torch.bfloat16).view(m, 2 * n)
        multiply = super().bind(node, replace(tensors, outputs=(both,)), stream)
        activate = _bind(both[:, :n], both[:, n:], y)

        def launch() -> None:
            multiply()
            activate()

        return launch


class GateUpBf16(_GateUp, mul_mat.Bf16):
    """Weights, activations, gate and up in bfloat16."""

    precision = 1e-4

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        return (stacked(weights, self.dtype, device),)


class GateUpFp8Row(_GateUp, fp8.Fp8Row):
    """A scale for each row of the activations, and one for each output; gate and up in bfloat16."""

    precision = 1e-2

    def packed_bytes(self, node: TensorNode) -> int:
        return 2 * super().packed_bytes(node)

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        packed = [super(GateUpFp8Row, self).prepare([weight], device) for weight in weights]
        return tuple(torch.cat(planes) for planes in zip(*packed, strict=True))


class GateUpFp8RowFast(GateUpFp8Row):
    """The same with the tensor cores' own sums, of fewer bits than float32 has."""

    name = "fp8_row_fast"
    precision = 1e-2
    fast = True
    on_cpu = False


def _written(node: TensorNode) -> Sequence[str]:
    return WRITTEN if node.outputs[0].shape[-1] <= LONGEST else FLOATS


def _bind(gate: torch.Tensor, up: torch.Tensor | None, y: Any) -> Launch:
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
