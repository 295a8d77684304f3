"""Dense mul_mat on CUDA, and what one GEMM of cuBLAS makes with it: stacked products and an added residual."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from kernelmux.contract import Device, Launch, Tensors
from kernelmux.contract.weights import dense, stacked
from kernelmux.graph.formats import Weight
from kernelmux.graph.graph import TensorNode
from kernelmux_torch import mul_mat
from kernelmux_torch.cuda.split_sums import added_in_float32

SPLIT = 2
"""Launches of a GEMM whose sum cuBLAS splits: at few rows and long k a second one adds the parts."""
STACKED = ("qkv", "mul_mat_pair")
"""Products of one input, whose weights one GEMM takes below one another and writes side by side."""


class Bf16(mul_mat.Bf16):
    """Weights and activations in bfloat16, summed in float32; one product is written in either."""

    ops = ("mul_mat", *STACKED)
    devices = ("cuda",)
    # At one row the bias is added in one of its own.
    on_card = SPLIT + 1
    side_by_side = True

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        return added_in_float32(super().call(node, tensors), self.dtype)

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        # The epilogue adds a bias of the weight's type to a result of that type.
        alone = len(node.outputs) == 1 and not node.bias
        return [[self.packed, "f32"] if alone else [self.packed] for _ in node.outputs]

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        matrices = [weight for weight in weights if len(weight.shape) == 2]
        biases = [dense(weight, self.dtype, device) for weight in weights[len(matrices) :]]
        whole = stacked(matrices, self.dtype, device) if len(matrices) > 1 else dense(matrices[0], self.dtype, device)
        return (whole, *([torch.cat(biases)] if biases else []))


class F16(Bf16):
    """Weights and activations in float16, summed in float32, written in either; sums over 65504 need float32."""

    # Gate and up outgrow float16 where queries, keys and values do not.
    ops = ("mul_mat", "qkv")
    name = "f16"
    precision = 1e-6
    packed = "f16"
    input_formats = ("f16",)


class F32(mul_mat.F32):
    """Float32 throughout."""

    devices = ("cuda", "rocm")
    # Four were seen in a captured call with a bias (17 x 257 x 256, an H100).
    on_card = SPLIT + 2

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        if torch.backends.cuda.matmul.fp32_precision not in ("ieee", "none"):
            raise RuntimeError(
                "this process lets torch multiply float32 in TF32: set torch.backends.cuda.matmul.fp32_precision"
            )
        return super().call(node, tensors)


class Bf16Add(mul_mat.Bf16):
    """y = residual + x Wᵀ in one GEMM where y is the residual's memory; elsewhere torch copies that first."""

    ops = ("mul_mat_add",)
    devices = ("cuda",)
    # One GEMM adds the residual, and no bias beside it.
    takes = {"bias": (False,)}
    on_card = SPLIT + 1

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        (x, residual), (y,), (weight,) = tensors.inputs, tensors.outputs, tensors.packed
        # torch spares its copy only where both are one object.
        in_place = residual.data_ptr() == y.data_ptr()
        add = partial(y.addmm_, x, weight.T) if in_place else partial(torch.addmm, residual, x, weight.T, out=y)
        return added_in_float32(add, self.dtype)
