"""Memory for one binding of a case's node: guarded on both sides, filled again before each launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernelmux.conformance.guarded import Guarded
from kernelmux.contract.answers import checked_workspace
from kernelmux.contract.device import Device
from kernelmux.contract.kernel import Kernel
from kernelmux.graph.formats import Value, lookup
from kernelmux.graph.graph import TensorNode


@dataclass(frozen=True, eq=False)
class Room:
    """Memory for one binding; an output may be an input's."""

    inputs: Sequence[Guarded]
    outputs: Sequence[Guarded]
    scratch: Guarded
    host: Sequence[torch.Tensor | None]
    """Of the inputs that are step state, mirrors in host memory; on the CPU the inputs themselves."""

    @classmethod
    def of(cls, node: TensorNode, kernel: Kernel, device: Device, apart: bool = False) -> Room:
        """Memory for a node; where `apart`, inputs of rows and columns have gaps between rows."""
        to = device.torch
        inputs = [
            Guarded.apart(value, to) if apart and _may_lie_apart(value) else Guarded.of(value, to)
            for value in node.inputs
        ]
        state = [value.format == "i32" for value in node.inputs]
        host = [memory.parts[0].cpu() if mirrored else None for memory, mirrored in zip(inputs, state, strict=True)]
        joined = kernel.joins(node)
        outputs = Guarded.side_by_side(node.outputs, to) if joined else [Guarded.of(v, to) for v in node.outputs]
        for source, target in node.contract.updates:
            outputs[target] = inputs[source]
        return cls(inputs, outputs, Guarded.scratch(checked_workspace(kernel, node), to), host)

    def restore(self, contents: Sequence[torch.Tensor]) -> None:
        """Inputs filled with what they held when that was kept."""
        for memory, held in zip(self.inputs, contents, strict=True):
            memory.restore(held)
        self.mirror()

    def mirror(self) -> None:
        """The mirrors hold what the inputs do."""
        for memory, mirror in zip(self.inputs, self.host, strict=True):
            if mirror is not None:
                mirror.copy_(memory.parts[0])


def _may_lie_apart(value: Value) -> bool:
    """Whether a value may be columns of a wider matrix: numbers of rows and columns, one plane."""
    return len(value.shape) == 2 and value.format != "i32" and lookup(value.format).plain
