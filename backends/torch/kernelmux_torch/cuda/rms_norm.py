"""rms_norm and qk_norm on CUDA: torch's own norm, which allocates what it gives.

It is one launch, and of rows that are no whole vectors of four two.
"""

from __future__ import annotations

import torch

from kernelmux.contract import Launch
from kernelmux.graph.graph import TensorNode
from kernelmux_torch import rms_norm


class RmsNorm(rms_norm.RmsNorm):
    devices = ("cuda", "rocm")
    on_card = 3

    def workspace(self, node: TensorNode) -> int:
        return 0

    def norm(
        self, x: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor, epsilon: float, workspace: torch.Tensor | None
    ) -> Launch:
        return lambda: y.copy_(torch.rms_norm(x, (x.shape[-1],), gamma, epsilon))


class QkNorm(RmsNorm, rms_norm.QkNorm):
    on_card = 6
