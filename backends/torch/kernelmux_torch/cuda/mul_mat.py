"""Dense mul_mat and mul_mat_add on CUDA: cuBLAS through torch, weights dequantised once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from kernelmux.contract.hookspecs import Answer, Declined, Kernel, Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_torch import mul_mat


def offer() -> list[Kernel | Declined]:
    """The dense kernels in the order of their use, and the CPU's packed ones refused by name."""
    exact: Kernel | Declined = F32()
    if torch.backends.cuda.matmul.fp32_precision not in ("ieee", "none"):
        reason = "this process lets torch multiply float32 in TF32: set torch.backends.cuda.matmul.fp32_precision"
        exact = Declined(reason, "unsupported", "f32")
    packed = [
        Declined("torch has it for the CPU only", "device", kernel.name) for kernel in (mul_mat.Int4, mul_mat.Int8)
    ]
    return [Bf16(), F16(), exact, *packed]


def offer_add(bias: bool) -> Answer:
    """mul_mat_add under the names of the mul_mats that it may stand for."""
    if bias:
        return Declined("its one GEMM adds the residual, and no bias beside it")
    overflows = Declined("its sum is written in float16, which overflows beyond 65504", "format", "f16")
    return [Bf16Add(), overflows]


SPLIT = 2
"""Launches of a GEMM whose sum cuBLAS splits: at few rows and long k a second one adds the parts."""


class Bf16(mul_mat.Bf16):
    """Weights and activations in bfloat16, summed in float32, written in either."""

    launches = SPLIT

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        # The epilogue adds a bias of the weight's type to a result of that type.
        return [[self.packed] if node.bias else [self.packed, "f32"]]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (x,), (y,) = tensors.inputs, tensors.outputs
        if y.dtype == x.dtype:
            return super().bind(node, tensors, stream)
        return partial(torch.mm, x, tensors.packed[0].T, out_dtype=y.dtype, out=y)


class F32(mul_mat.F32):
    """Float32 throughout."""

    # Four were seen in a captured call with a bias (17 x 257 x 256, an H100).
    launches = SPLIT + 2


class F16(Bf16):
    """Weights and activations in float16, summed in float32, written in either; sums over 65504 need float32."""

    name = "f16"
    precision = 1e-6
    packed = "f16"
    dtype = torch.float16

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [["f16"]]


class Bf16Add(mul_mat.Bf16):
    """y = residual + x Wᵀ in one GEMM where y is the residual's memory; elsewhere torch copies that first."""

    launches = SPLIT + 1
    # The sum is the GEMM's own: whoever else would add is spared.
    stands_for = ("triton",)

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [[self.packed], [self.packed]]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [[self.packed]]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (x, residual), (y,), (weight,) = tensors.inputs, tensors.outputs, tensors.packed
        if residual.data_ptr() == y.data_ptr():
            # torch spares its copy only where both are one object.
            return partial(y.addmm_, x, weight.T)
        return partial(torch.addmm, residual, x, weight.T, out=y)
