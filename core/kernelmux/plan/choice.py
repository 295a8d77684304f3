"""A choice: the kernel of one node, why it was chosen, and who lost; and what rules a kernel out for a node's kind."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any

from kernelmux.contract.answers import checked_formats, checked_variants
from kernelmux.contract.kernel import Declined, Kernel, ReasonKind
from kernelmux.errors import BackendError, nearest
from kernelmux.graph.graph import TensorNode
from kernelmux.measure.predict import Prediction


@dataclass(frozen=True)
class Rejection:
    """A candidate that did not get a node, and why."""

    kernel: str
    reason: str
    kind: ReasonKind


@dataclass(frozen=True)
class Taken:
    """The variant of a kernel that is taken for up to so many rows, by its `str`, and where that is known from."""

    rows: int
    variant: str
    source: str


@dataclass(frozen=True)
class Placed:
    """The kernel of a node, by full name, why it was chosen, and who lost."""

    name: str
    reason: str
    rejected: tuple[Rejection, ...] = ()
    rule: int | None = None
    """The policy's rule, None for its defaults."""
    asked: str = ""
    """The policy's words for it: `torch`, or `torch:int4`."""
    on_error: str = "error"
    """What happens where it raises in a walk."""
    variants: tuple[Taken, ...] = ()
    """Of a kernel that has variants which one is taken, by row counts, ascending."""
    predicted: Prediction | None = None
    """Where `auto` chose: how long a call is going to take, at the bucket's largest row count."""

    @property
    def backend(self) -> str:
        return self.name.partition(":")[0]

    def told(self) -> dict[str, Any]:
        """All of this by its fields' names."""
        return {each.name: getattr(self, each.name) for each in fields(Placed)}


@dataclass(frozen=True)
class Choice(Placed):
    """The same with the kernel itself."""

    kernel: Kernel = field(kw_only=True)

    def kernel_at(self, node: TensorNode) -> Kernel:
        """The kernel with the variant that is taken for the rows of a node whose extents are known."""
        taken = next((taken for taken in self.variants if node.rows <= taken.rows), None)
        if taken is None:
            return self.kernel
        kernel = copy(self.kernel)
        named = checked_variants(kernel, node)
        if not named:
            return kernel
        if taken.variant not in named:
            raise BackendError(
                f"{self.name} has no variant {taken.variant!r} for {node.name}{nearest(taken.variant, named)}",
                node=node.name,
                kernel=self.name,
            )
        kernel.variant = named[taken.variant]
        return kernel


def unreadable(kernel: Kernel, node: TensorNode) -> Declined | None:
    """The refusal of a kernel that wants an input in a format into which it cannot be converted.

    Only activations of rows and columns can: not ids, and not a cache. BackendError where the kernel's declarations do
    not fit the node at all.
    """
    inputs = checked_formats(kernel, node)["inputs"]
    for value, accepted in zip(node.inputs, inputs, strict=True):
        if not value.convertible and value.format not in accepted:
            return Declined(f"it reads {value.name} as {' or '.join(accepted)}, not as {value.format}", "format")
    return None
