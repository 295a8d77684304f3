"""gate_up_swiglu and qkv_rope_copy: products into the workspace, then what other ops' kernels do with them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from kernelmux.contract import Declined, Tensors
from kernelmux.graph.formats import CACHE_FORMATS, Value
from kernelmux.graph.graph import TensorNode
from kernelmux_numba.elementwise import one_by_one
from kernelmux_numba.mul_mat import Float, Int16, Products
from kernelmux_numba.norm import FOR_PRODUCTS
from kernelmux_numba.rope import turned
from kernelmux_numba.team import Phase


class _Fused(Products):
    """Beside the class of products that a kernel is of."""

    @abstractmethod
    def products(self, node: TensorNode) -> TensorNode:
        """The node of the products alone."""

    @abstractmethod
    def after(
        self, node: TensorNode, tensors: Tensors, made: Sequence[torch.Tensor], divisors: Sequence[torch.Tensor]
    ) -> Phase:
        """What becomes of the products."""

    def refuses(self, node: TensorNode) -> Declined | None:
        return super().refuses(self.products(node))

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [self.input_formats, *([value.format] for value in node.inputs[1:])]

    def packed_bytes(self, node: TensorNode) -> int:
        alone = self.products(node)
        others = node.weight[len(alone.weight) :]
        return super().packed_bytes(alone) + sum(4 * math.prod(value.extents) for value in others)

    def workspace(self, node: TensorNode) -> int:
        alone = self.products(node)
        return super().workspace(alone) + sum(value.nbytes for value in alone.outputs)

    def phases(self, node: TensorNode, tensors: Tensors) -> Sequence[Phase]:
        alone, scratch = self.products(node), tensors.workspace
        assert scratch is not None
        made = []
        for value in alone.outputs:
            made.append(scratch[: value.nbytes].view(torch.float32).view(value.extents))
            scratch = scratch[value.nbytes :]
        matrices, others = len(alone.weight), len(node.weight)
        packed = (*tensors.packed[:matrices], *tensors.packed[others:])
        rest = scratch if len(scratch) else None
        phases = super().phases(alone, Tensors(tensors.inputs[:1], tuple(made), packed, rest))
        return [*phases, self.after(node, tensors, made, tensors.packed[matrices:others])]


class _GateUpSwiglu(_Fused):
    ops = ("gate_up_swiglu",)
    output_formats = FOR_PRODUCTS

    def products(self, node: TensorNode) -> TensorNode:
        return _alone(node, "mul_mat_pair", 2)

    def after(
        self, node: TensorNode, tensors: Tensors, made: Sequence[torch.Tensor], divisors: Sequence[torch.Tensor]
    ) -> Phase:
        gate_and_up = self.products(node).outputs
        return [one_by_one(self, "swiglu", gate_and_up, node.outputs[0], (*made, *tensors.outputs))]


class _QkvRopeCopy(_Fused):
    ops = ("qkv_rope_copy",)
    takes: Mapping[str, object] = {"cache_format": CACHE_FORMATS}

    def products(self, node: TensorNode) -> TensorNode:
        return _alone(node, "qkv", 3)

    def after(
        self, node: TensorNode, tensors: Tensors, made: Sequence[torch.Tensor], divisors: Sequence[torch.Tensor]
    ) -> Phase:
        (_, positions, slots, *caches), (q, k, v) = tensors.inputs, made
        copied: tuple[str, torch.Tensor, torch.Tensor, Sequence[Any]] = (node.inputs[3].format, slots, v, caches)
        return [turned(self, node, divisors, positions, (q, k), (tensors.outputs[0], k), copied)]


def _alone(node: TensorNode, op: str, count: int) -> TensorNode:
    """The node of so many products of a fused node's first input."""
    (m, _), weights = node.inputs[0].shape, node.weight[:count]
    outputs = tuple(Value(weight.name, (m, weight.shape[0])) for weight in weights)
    return replace(node, op=op, inputs=node.inputs[:1], weight=weights, outputs=outputs)


class Int16GateUpSwiglu(_GateUpSwiglu, Int16):
    precision = 4 * Int16.precision


class FloatGateUpSwiglu(_GateUpSwiglu, Float):
    pass


class Int16QkvRopeCopy(_QkvRopeCopy, Int16):
    pass


class FloatQkvRopeCopy(_QkvRopeCopy, Float):
    pass
