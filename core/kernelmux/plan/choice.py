"""A choice: the kernel of one node, why it was chosen, and who lost; and what rules a kernel out for a node's kind."""

from __future__ import annotations

from dataclasses import dataclass

from kernelmux.contract.hookspecs import Declined, Kernel, ReasonKind
from kernelmux.errors import BackendError, nearest
from kernelmux.graph.formats import FORMATS
from kernelmux.graph.graph import TensorNode


@dataclass(frozen=True)
class Rejection:
    """A candidate that did not get a node, and why."""

    kernel: str
    reason: str
    kind: ReasonKind


@dataclass(frozen=True)
class Choice:
    """The kernel of a node, by full name, why it was chosen, and who lost."""

    name: str
    kernel: Kernel
    reason: str
    rejected: tuple[Rejection, ...]
    rule: int | None = None
    """The policy's rule, None for its defaults."""
    asked: str = ""
    """The policy's words for it: `torch`, or `torch:int4`."""
    on_error: str = "error"
    """What happens where it raises in a walk."""


def unreadable(name: str, kernel: Kernel, node: TensorNode) -> Declined | None:
    """The refusal of a kernel that wants an input in a format into which it cannot be converted.

    Only activations of rows and columns can: not ids, and not a cache. BackendError where the kernel's declarations do
    not fit the node at all.
    """
    inputs, outputs = kernel.inputs(node), kernel.outputs(node)
    for what, values, formats in (("inputs", node.inputs, inputs), ("outputs", node.outputs, outputs)):
        if len(formats) != len(values) or not all(formats):
            raise BackendError(f"{name}.{what} must give formats for each of {len(values)} {what} of a {node.op}")
        if unknown := [format for each in formats for format in each if format not in FORMATS]:
            raise BackendError(f"{name}.{what}: unknown format {unknown[0]!r}{nearest(unknown[0], FORMATS)}")
    for value, accepted in zip(node.inputs, inputs, strict=True):
        fixed = len(value.shape) != 2 or value.format == "i32"
        if fixed and value.format not in accepted:
            return Declined(f"it reads {value.name} as {' or '.join(accepted)}, not as {value.format}", "format")
    return None


def stands_for(name: str, kernel: Kernel, part: TensorNode, choice: Choice) -> bool:
    """Whether a fused kernel may run a part that `choice` was made for."""
    if part.weight or ":" in choice.asked:
        return name == choice.name
    return choice.name.partition(":")[0] in (name.partition(":")[0], *kernel.stands_for)
