"""What the kernels of this backend share: their torch calls go to the stream that they are bound to."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from kernelmux.contract import Kernel, Launch, Tensors, on_stream
from kernelmux.graph.graph import TensorNode

FLOATS = ("f32", "bf16", "f16")


class TorchKernel(Kernel):
    """A kernel of torch calls; `on_card` are its launches there, at most, for a library may split its work."""

    on_card = 1

    @property
    def launches(self) -> int:  # type: ignore[override]
        return self.on_card if self.device.kind != "cpu" else 1

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        return on_stream(self.call(node, tensors), stream)

    @abstractmethod
    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        """The launch, on whatever stream is torch's current one."""
