"""gate_up_swiglu on CUDA: one GEMM of both weights, then kernelmux-triton's swiglu of its halves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from kernelmux.contract.device import Device
from kernelmux.contract.hookspecs import Declined, Kernel, Launch, Tensors, in_turn
from kernelmux.graph.formats import Weight
from kernelmux.graph.graph import TensorNode
from kernelmux_torch import fp8
from kernelmux_torch.cuda import mul_mat
from kernelmux_torch.weights import stacked
from kernelmux_triton.elementwise import bind_swiglu, swiglu_formats


def offer(n: int, k: int, bias: bool, device: Device) -> list[Kernel | Declined]:
    """gate_up_swiglu under the names of the mul_mats that it may stand for, or why not."""
    kernels = (GateUpBf16(), GateUpFp8Row(), GateUpFp8RowFast())
    if bias:
        return [Declined("its GEMM of both weights adds no biases", "unsupported", kernel.name) for kernel in kernels]
    bf16, *scaled = kernels
    return [bf16, *(kernel.refusal(n, k, bias, device) or kernel for kernel in scaled)]


class _GateUp(Kernel):
    """Over a mul_mat of the stacked weights [2n, k], whose results are rounded to bfloat16 (float16 ends at 65504)."""

    launches = mul_mat.SPLIT + 1
    stands_for = ("triton",)

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [swiglu_formats(node)]

    def workspace(self, node: TensorNode) -> int:
        m, n = node.outputs[0].extents
        return 2 * m * 2 * n

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (y,), (m, n) = tensors.outputs, node.outputs[0].extents
        assert tensors.workspace is not None
        both = tensors.workspace.view(torch.bfloat16).view(m, 2 * n)
        multiply = super().bind(node, replace(tensors, outputs=(both,)), stream)
        activate = bind_swiglu(both[:, :n], both[:, n:], y, node.outputs[0].format)
        return in_turn(multiply, activate)


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
