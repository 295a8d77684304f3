"""add, mul, silu and convert: one torch call each, in any mix of f32, bf16 and f16."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Kernel, Launch, Tensors

FLOATS = ("f32", "bf16", "f16")


class _Elementwise(Kernel):
    name = "f32"
    precision = 1e-11

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS for _ in node.inputs]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS]


class Add(_Elementwise):
    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        a, b = tensors.inputs
        return partial(torch.add, a, b, out=tensors.outputs[0])


class Mul(_Elementwise):
    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        a, b = tensors.inputs
        return partial(torch.mul, a, b, out=tensors.outputs[0])


class Silu(_Elementwise):
    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (x,), (y,) = tensors.inputs, tensors.outputs
        if x.dtype == y.dtype:
            return partial(torch.ops.aten.silu.out, x, out=y)

        # torch's silu writes no other type than it reads; its sigmoid does. Then x and y are not the same memory.
        def launch() -> None:
            torch.sigmoid(x, out=y)
            y.mul_(x)

        return launch


class Convert(_Elementwise):
    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [[node.outputs[0].format]]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        return partial(tensors.outputs[0].copy_, tensors.inputs[0])
