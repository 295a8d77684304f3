"""qkv_rope_copy on CUDA: one GEMM of the three weights, then kernelmux-triton's kernel that turns and scatters them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from kernelmux.contract.device import Device
from kernelmux.contract.hookspecs import Declined, Kernel, Launch, Planes, Tensors, in_turn
from kernelmux.graph.formats import Weight, lookup
from kernelmux.graph.graph import TensorNode
from kernelmux_torch import fp8
from kernelmux_torch.cuda.mul_mat import SPLIT
from kernelmux_torch.elementwise import FLOATS
from kernelmux_torch.weights import dense, stacked
from kernelmux_triton.rope_copy import bind_rope_copy, split_weights


def offer(node: TensorNode, device: Device) -> list[Kernel | Declined]:
    """Each kernel under the name of the mul_mats that it stands for."""
    (_, k), n = node.weight[0].extents, _outputs(node)
    answers: list[Kernel | Declined] = [Bf16(), F16()]
    for kernel in (Fp8Row(), Fp8RowFast()):
        answers.append(kernel.gemm.refusal(n, k, bool(node.bias), device) or kernel)
    return answers


class Bf16(Kernel):
    """The weights stacked in bfloat16, x in bfloat16, their product rounded to it before it is turned."""

    name = "bf16"
    precision = 5e-5
    packed = "bf16"
    launches = SPLIT + 1
    stands_for = ("triton",)
    dtype = torch.bfloat16

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [[self.packed], *([value.format] for value in node.inputs[1:])]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS, *([value.format] for value in node.outputs[1:])]

    def packed_bytes(self, node: TensorNode) -> int:
        n, k = _outputs(node), node.weight[0].extents[1]
        return self.linear_bytes(n, k) + (2 * n if node.bias else 0) + sum(4 * d.extents[0] for d in node.weight[3:])

    def linear_bytes(self, n: int, k: int) -> int:
        """Bytes of the packed matrix [n, k]."""
        return 2 * n * k

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        matrices, divisors, biases = split_weights(weights)
        planes = self.stack(matrices, device)
        bias = [torch.cat([dense(value, self.dtype, device) for value in biases])] if biases else []
        return (*planes, *bias, *(dense(value, torch.float32, device) for value in divisors))

    def stack(self, matrices: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        """The planes of the matrices, one below the other."""
        return (stacked(matrices, self.dtype, device),)

    def workspace(self, node: TensorNode) -> int:
        return 2 * node.inputs[0].extents[0] * _outputs(node)

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        x, positions, slots, k_cache, v_cache = tensors.inputs
        assert tensors.workspace is not None
        mixed = tensors.workspace.view(self.dtype).view(len(positions), -1)
        has_divisors = len(node.weight) > 3
        linear = tensors.packed[: len(tensors.packed) - has_divisors]
        multiply = self.multiply(x, mixed, *linear)
        divisors = tensors.packed[len(linear) :]
        place = bind_rope_copy(node, mixed, tensors.outputs[0], (k_cache, v_cache), positions, slots, divisors)
        return in_turn(multiply, place)

    def multiply(self, x: Planes, y: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> Launch:
        """The call that computes y = x Wᵀ + b."""
        if bias:
            return partial(torch.addmm, bias[0], x, weight.T, out=y)
        return partial(torch.mm, x, weight.T, out=y)


class F16(Bf16):
    """The same in float16."""

    name = "f16"
    precision = 1e-6
    packed = "f16"
    dtype = torch.float16


class Fp8Row(Bf16):
    """x and the stacked weights in e4m3 with a scale a row, their product in bfloat16."""

    gemm: fp8.Fp8Row = fp8.Fp8Row()
    name = gemm.name
    precision = gemm.precision
    packed = gemm.packed

    def linear_bytes(self, n: int, k: int) -> int:
        return lookup(self.packed).nbytes((n, k))

    def stack(self, matrices: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        planes = [self.gemm.prepare([matrix], device) for matrix in matrices]
        return tuple(torch.cat(parts) for parts in zip(*planes, strict=True))

    def multiply(self, x: Planes, y: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> Launch:
        return self.gemm.multiply(x, y, weight, *rest)


class Fp8RowFast(Fp8Row):
    """The same with the tensor cores' own sums."""

    gemm = fp8.Fp8RowFast()
    name = gemm.name
    precision = gemm.precision


def _outputs(node: TensorNode) -> int:
    return sum(weight.extents[0] for weight in node.weight[:3])
