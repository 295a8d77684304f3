"""qkv_rope_copy: one product of three weights, by any kernel of mul_mat, then the kernel that turns and scatters it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from kernelmux.contract.device import Device
from kernelmux.contract.hookspecs import Declined, Kernel, Launch, Tensors, in_turn
from kernelmux.graph.formats import Value, Weight, aligned, lookup
from kernelmux.graph.graph import TensorNode, make_node
from kernelmux_triton.few_rows import FLOATS, FewRows
from kernelmux_triton.fp8 import Fp8Row
from kernelmux_triton.mul_mat import kernels, tiled, with_rows
from kernelmux_triton.rope_copy import bind_rope_copy, split_weights


def offer(node: TensorNode, m: int, device: Device) -> list[Kernel | Declined]:
    """Each kernel of mul_mat under its name, its tiling for m rows chosen, or why not."""
    if (cache := node.outputs[1].format) not in FLOATS:
        return [Declined(f"it writes caches in {', '.join(FLOATS)}, not {cache}: copy alone does", "format")]
    answers = tiled(kernels(_linear(node), m, device), with_rows(_product(node), m))
    return [kernel if isinstance(kernel, Declined) else QkvRopeCopy(kernel) for kernel in answers]


class QkvRopeCopy(Kernel):
    """The weights stacked as one; their product as the kernel writes it best is turned, and rounded once more."""

    def __init__(self, product: FewRows | Fp8Row) -> None:
        self.product = product
        self.name, self.packed = product.name, product.packed  # type: ignore[misc]
        self.precision = product.precision  # type: ignore[misc]
        self.launches = product.launches + 1  # type: ignore[misc]

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        (x,) = self.product.inputs(_product(node))
        return [x, *([value.format] for value in node.inputs[1:])]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS, *([value.format] for value in node.outputs[1:])]

    def packed_bytes(self, node: TensorNode) -> int:
        return self.product.packed_bytes(_linear(node)) + sum(4 * value.extents[0] for value in node.weight[3:])

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        matrices, divisors, biases = split_weights(weights)
        linear = self.product.prepare([*matrices, *biases], device)
        return (*linear, *(value.dequantize().to(device.torch) for value in divisors))

    def workspace(self, node: TensorNode) -> int:
        product = self._written(node)
        return aligned(product.outputs[0].nbytes) + self.product.workspace(product)

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        x, positions, slots, k_cache, v_cache = tensors.inputs
        assert tensors.workspace is not None
        product = self._written(node)
        (y,) = product.outputs
        mixed = tensors.workspace[: y.nbytes].view(lookup(y.format).dtype).view(y.extents)
        rest = tensors.workspace[aligned(y.nbytes) :]
        linear = tensors.packed[: len(tensors.packed) - len(node.weight[3:])]
        divisors = tensors.packed[len(linear) :]
        operands = Tensors((x,), (mixed,), linear, rest if self.product.workspace(product) else None)
        multiply = self.product.bind(product, operands, stream)
        place = bind_rope_copy(node, mixed, tensors.outputs[0], (k_cache, v_cache), positions, slots, divisors)
        return in_turn(multiply, place)

    def _written(self, node: TensorNode) -> TensorNode:
        """The product in the format that its kernel writes best: float32 for few rows, so one rounding is left."""
        product = _product(node)
        (y,) = product.outputs
        return replace(product, outputs=(replace(y, format=self.product.outputs(product)[0][0]),))


def _linear(node: TensorNode) -> TensorNode:
    """The node without its rope's divisors."""
    return replace(node, weight=node.weight[:3])


def _product(node: TensorNode) -> TensorNode:
    """The mul_mat [m, queries, keys and values in a row] by one weight, and one bias, as three are stacked."""
    first = node.weight[0]
    n, k = sum(weight.extents[0] for weight in node.weight[:3]), first.extents[1]
    bias = (Value("bias", (n,)),) if node.bias else ()
    return make_node("mul_mat", node.name, node.inputs[0], weight=(Value("qkv", (n, k), first.format),), bias=bias)
