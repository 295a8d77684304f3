"""add, mul, scale, silu, gelu, soft_cap, clamped_swiglu and temper in any mix of f32, bf16 and f16, by torch calls.

One each, but three of soft_cap, and of an activation that changes the format; seven of temper, eight of clamped_swiglu.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch

from kernelmux.contract import Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_torch.kernel import FLOATS, TorchKernel


class _Elementwise(TorchKernel):
    name = "f32"
    precision = 1e-11
    input_formats = output_formats = FLOATS


class Add(_Elementwise):
    ops = ("add",)

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        (a, b), (y,) = tensors.inputs, tensors.outputs
        if _rounded_once(a, b, y):
            return partial(torch.add, a, b, out=y)
        return partial(torch.addcmul, a, b, torch.ones(1, device=y.device), out=y)


class Mul(_Elementwise):
    ops = ("mul",)

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        (a, b), (y,) = tensors.inputs, tensors.outputs
        if _rounded_once(a, b, y):
            return partial(torch.mul, a, b, out=y)
        return partial(torch.addcmul, torch.zeros(1, device=y.device), a, b, out=y)


def _rounded_once(a: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> bool:
    """torch rounds to the type that its inputs promote to: one in float32 beside them keeps it from that."""
    return torch.promote_types(a.dtype, b.dtype) in (torch.float32, y.dtype)


class Scale(_Elementwise):
    ops = ("scale",)

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        (x,), (y,) = tensors.inputs, tensors.outputs
        # In float32, which a number of no dimensions would leave where both are in less.
        return partial(torch.mul, x, torch.tensor([node.scale], device=y.device), out=y)


class Silu(_Elementwise):
    ops: tuple[str, ...] = ("silu",)
    # Where it writes another format than it reads, through float32 scratch.
    on_card = 3

    def workspace(self, node: TensorNode) -> int:
        (x,), (y,) = node.inputs, node.outputs
        return 0 if x.format == y.format else 4 * math.prod(x.extents)

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        (x,), (y,) = tensors.inputs, tensors.outputs
        if x.dtype == y.dtype:
            return self.activation(x, y)
        # torch's activations write no other type than they read.
        assert tensors.workspace is not None
        wide = tensors.workspace.view(torch.float32).view(x.shape)
        in_place = self.activation(wide, wide)

        def launch() -> None:
            wide.copy_(x)
            in_place()
            y.copy_(wide)

        return launch

    def activation(self, x: torch.Tensor, y: torch.Tensor) -> Launch:
        return partial(torch.ops.aten.silu.out, x, out=y)


class Gelu(Silu):
    ops = ("gelu",)

    def activation(self, x: torch.Tensor, y: torch.Tensor) -> Launch:
        return partial(torch.ops.aten.gelu.out, x, approximate="tanh", out=y)


class SoftCap(_Elementwise):
    ops = ("soft_cap",)
    on_card = 3

    def workspace(self, node: TensorNode) -> int:
        (y,) = node.outputs
        return 0 if y.format == "f32" else 4 * math.prod(y.extents)

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        (x,), (y,) = tensors.inputs, tensors.outputs
        wide = y if tensors.workspace is None or y.dtype == torch.float32 else tensors.workspace.view(torch.float32)
        wide = wide.view(x.shape)
        cap = torch.tensor([node.soft_cap], device=y.device)

        def launch() -> None:
            torch.div(x, cap, out=wide)
            torch.tanh(wide, out=wide)
            torch.mul(wide, cap, out=y)

        return launch


class ClampedSwiglu(_Elementwise):
    """Of gates far below zero the exponential has the error of alpha times the gate, rounded: six millionths."""

    ops = ("clamped_swiglu",)
    precision = 5e-11
    on_card = 9

    def workspace(self, node: TensorNode) -> int:
        return 8 * math.prod(node.outputs[0].extents)

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        (gate, up), (y,) = tensors.inputs, tensors.outputs
        assert tensors.workspace is not None
        # Both inputs are read before y, which may be either, is written.
        gated, opened = tensors.workspace.view(torch.float32).view(2, *gate.shape)
        limit = node.limit

        def launch() -> None:
            gated.copy_(gate).clamp_(max=limit)
            torch.mul(gated, node.alpha, out=opened)
            gated.mul_(opened.sigmoid_())
            opened.copy_(up).clamp_(-limit, limit).add_(1)
            torch.mul(gated, opened, out=y)

        return launch


class Temper(_Elementwise):
    ops = ("temper",)
    on_card = 7

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS, ["i32"]]

    def workspace(self, node: TensorNode) -> int:
        return 8 * node.inputs[0].extents[0]

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        (x, positions), (y,) = tensors.inputs, tensors.outputs
        assert tensors.workspace is not None
        # Of whole numbers, so that the floor is exact.
        passed, factor = tensors.workspace.view(torch.int32).view(2, -1, 1)
        factor = factor.view(torch.float32)

        def launch() -> None:
            torch.add(positions.unsqueeze(1), 1, out=passed)
            passed.floor_divide_(node.span)
            factor.copy_(passed)
            factor.log1p_().mul_(node.scale).add_(1)
            torch.mul(x, factor, out=y)

        return launch
