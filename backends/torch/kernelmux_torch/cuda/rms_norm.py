"""rms_norm and qk_norm on CUDA: torch's own norm is one launch there, which allocates what it gives."""

from __future__ import annotations

import torch

from kernelmux.contract import Launch, Tensors
from kernelmux.contract.kernel import in_turn
from kernelmux.graph.graph import TensorNode
from kernelmux_torch import rms_norm


class RmsNorm(rms_norm.RmsNorm):
    devices = ("cuda", "rocm")
    on_card = 2

    def workspace(self, node: TensorNode) -> int:
        return 0

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        (x,), (y,), (gamma,) = tensors.inputs, tensors.outputs, tensors.packed
        return _normed(x, y, gamma, node.epsilon)


class QkNorm(RmsNorm):
    """Heads are rows of their own."""

    ops = ("qk_norm",)
    on_card = 4

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        queries, keys = (
            _normed(*(t.view(len(t), -1, node.head_dim) for t in (x, y)), gamma, node.epsilon)
            for x, y, gamma in zip(tensors.inputs, tensors.outputs, tensors.packed, strict=True)
        )
        return in_turn(queries, keys)


def _normed(x: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> Launch:
    return lambda: y.copy_(torch.rms_norm(x, (x.shape[-1],), gamma, epsilon))
