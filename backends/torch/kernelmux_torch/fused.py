"""qkv and gate_up_swiglu: the weights of one input stacked, so that one mul_mat reads them all.

Each has the name of the mul_mat kernel that it is made of: a policy that chooses `torch:int4` gets both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import silu

from kernelmux.device import Device
from kernelmux.formats import Weight
from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Answer, Declined, Kernel, Launch, Tensors
from kernelmux_torch.elementwise import FLOATS
from kernelmux_torch.mul_mat import F32, Int4, Product, dense_by_speed, refuse_packed


def offer(kind: type[Stacked], node: TensorNode) -> Answer:
    """The fused op on each kernel of mul_mat that can hold stacked weights, or why not."""
    if node.bias:
        return Declined("it adds no bias")
    n = min(value.extents[0] for value in node.weight)
    formats = [value.format for value in node.weight]
    int4 = Int4()
    return [*(kind(dense) for dense in dense_by_speed()), refuse_packed(int4, n, formats, bias=False) or kind(int4)]


class Stacked(Kernel):
    """A mul_mat of stacked weights, and what is done with its rows."""

    def __init__(self, base: F32 | Int4) -> None:
        self.base = base
        self.name = base.name
        self.precision = base.precision
        self.packed = base.packed

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return self.base.inputs(node)

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS for _ in node.outputs]

    def packed_bytes(self, node: TensorNode) -> int:
        return self.base.packed_bytes(node)

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        return self.base.stack(weights)

    def workspace(self, node: TensorNode) -> int:
        return self.base.product_bytes(node.inputs[0].extents[0], sum(v.extents[0] for v in node.weight))

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (x,) = tensors.inputs
        product = self.base.product(x, tensors.packed, tensors.workspace)
        return self.finish(product, [value.extents[0] for value in node.weight], tensors.outputs)

    def finish(self, product: Product, widths: Sequence[int], outputs: Sequence[torch.Tensor]) -> Launch:
        """A call that makes the outputs from the product's columns, `widths` of each weight."""
        raise NotImplementedError


class Qkv(Stacked):
    def finish(self, product: Product, widths: Sequence[int], outputs: Sequence[torch.Tensor]) -> Launch:
        q, k, v = outputs
        split = list(widths)

        def launch() -> None:
            q_part, k_part, v_part = product().split(split, dim=1)
            q.copy_(q_part)
            k.copy_(k_part)
            v.copy_(v_part)

        return launch


class GateUpSwiglu(Stacked):
    def finish(self, product: Product, widths: Sequence[int], outputs: Sequence[torch.Tensor]) -> Launch:
        (y,) = outputs

        def launch() -> None:
            gate, up = product().chunk(2, dim=1)
            torch.mul(silu(gate.float()), up, out=y)

        return launch
