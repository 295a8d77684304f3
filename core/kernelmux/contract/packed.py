"""The weights' packed forms: what a kernel's `prepare` makes of them, each made once and shared by name.

Enters: nodes with their kernels, a model's weights. Leaves: the form's key, its bytes, its tensors on a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kernelmux.contract.device import Device
from kernelmux.contract.hookspecs import Kernel
from kernelmux.graph.formats import Weight
from kernelmux.graph.graph import TensorNode

if TYPE_CHECKING:
    import torch

Form = tuple[tuple[str, ...], str]
"""A packed form: the weights that it is made of, and its name, `backend/form`."""


def packed_form(node: TensorNode, kernel_name: str, kernel: Kernel) -> Form | None:
    """The form that a kernel packs a node's weights into; None where it packs nothing."""
    return packed_key(node, kernel_name, kernel) if node.weights and kernel.packed_bytes(node) else None


def packed_key(node: TensorNode, kernel_name: str, kernel: Kernel) -> Form:
    """What packed weights are shared by: the tensors' names, and the form's name within its backend."""
    backend = kernel_name.partition(":")[0]
    return tuple(value.name for value in node.weights), f"{backend}/{kernel.packed or kernel_name}"


@dataclass
class PackedWeights:
    """The weights' packed forms on one device, shared by every node and plan that wants them."""

    weights: Mapping[str, Weight]
    device: Device
    _forms: dict[Form, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def get(self, node: TensorNode, kernel_name: str, kernel: Kernel) -> tuple[torch.Tensor, ...]:
        """The packed weights of a node for a kernel, made now if nobody asked before."""
        key = packed_key(node, kernel_name, kernel)
        if key not in self._forms:
            self._forms[key] = kernel.prepare([self.weights[value.name] for value in node.weights], self.device)
        return self._forms[key]

    @property
    def nbytes(self) -> int:
        """Bytes of all packed forms made so far."""
        return sum(part.nbytes for form in self._forms.values() for part in form)
