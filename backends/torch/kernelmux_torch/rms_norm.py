"""rms_norm and qk_norm, five torch calls a tensor that write where told: torch's own norm allocates."""

from __future__ import annotations

import math

import torch

from kernelmux.contract import Launch, Tensors
from kernelmux.contract.kernel import in_turn
from kernelmux.graph.graph import TensorNode
from kernelmux_torch.kernel import FLOATS, TorchKernel


class RmsNorm(TorchKernel):
    ops: tuple[str, ...] = ("rms_norm",)
    name = "f32"
    # torch's norm adds a row's columns in order: of 20,480 equal ones each sum is rounded the same way.
    precision = 1e-10
    packed = "f32"
    devices: tuple[str, ...] = ("cpu",)
    input_formats = ("f32",)
    output_formats = FLOATS

    def workspace(self, node: TensorNode) -> int:
        m, k = node.inputs[0].extents
        return 4 * (m * k + m)

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        (x,), (y,), (gamma,) = tensors.inputs, tensors.outputs, tensors.packed
        return self.norm(x, y, gamma, node.epsilon, tensors.workspace)

    def norm(
        self, x: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor, epsilon: float, workspace: torch.Tensor | None
    ) -> Launch:
        """The calls that norm x [..., k] into y, which may be the same memory."""
        assert workspace is not None
        scratch, (*rows, k) = workspace.view(torch.float32), x.shape
        scaled, rest = scratch[: x.numel()].view(x.shape), scratch[x.numel() :]
        norm = rest[: math.prod(rows)].view(*rows, 1)
        least = torch.tensor(epsilon, device=x.device)
        share = 1 / k

        def launch() -> None:
            torch.linalg.vector_norm(x, dim=-1, keepdim=True, out=norm)
            torch.addcmul(least, norm, norm, value=share, out=norm)
            norm.rsqrt_()
            torch.mul(x, norm, out=scaled)
            torch.mul(scaled, gamma, out=y)

        return launch


class QkNorm(RmsNorm):
    """Heads are rows of their own."""

    ops = ("qk_norm",)

    def workspace(self, node: TensorNode) -> int:
        # Queries and keys take turns with it.
        m, widest = node.inputs[0].extents[0], max(node.num_heads, node.num_kv_heads)
        return 4 * m * widest * (node.head_dim + 1)

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        queries, keys = (
            self.norm(*(t.view(len(t), -1, node.head_dim) for t in (x, y)), gamma, node.epsilon, tensors.workspace)
            for x, y, gamma in zip(tensors.inputs, tensors.outputs, tensors.packed, strict=True)
        )
        return in_turn(queries, keys)
