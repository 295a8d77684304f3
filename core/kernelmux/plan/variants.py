"""Which variant of a kernel a plan takes: measured on this machine, shipped with the backend, or stated by the kernel.

Enters: kernels with their nodes, row counts. Leaves: what is taken, and where that is known from. Nothing is measured
here: `measure/` does that, and keeps what it found where this looks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from kernelmux.contract.device import Device
from kernelmux.contract.kernel import Kernel
from kernelmux.graph.graph import TensorNode
from kernelmux.measure.table import Table, read_tables
from kernelmux.plan.choice import Choice, Taken

DEFAULT = "default"
"""The source of a variant that is the kernel's first."""


@dataclass
class Variants:
    """Looks variants up for one device; alike work is looked up once."""

    device: Device
    _tables: dict[str, tuple[Table, ...]] = field(default_factory=dict)

    def taken(self, choice: Choice, node: TensorNode, low: int, high: int) -> tuple[Taken, ...]:
        """What a choice takes for a node of `low` to `high` rows; nothing where its kernel has no variants."""
        found: list[Taken] = []
        for rows in _row_classes(low, high):
            at = node.at(rows)
            if not (named := {str(variant): variant for variant in choice.kernel.variants(at)}):
                continue
            variant, source = self._pick(choice.kernel, choice.kernel.work(at), named)
            if found and (found[-1].variant, found[-1].source) == (variant, source):
                found.pop()
            found.append(Taken(rows, variant, source))
        return tuple(found)

    def _pick(self, kernel: Kernel, work: str, named: Mapping[str, object]) -> tuple[str, str]:
        package = type(kernel).__module__.partition(".")[0]
        if package not in self._tables:
            self._tables[package] = read_tables(package, self.device)
        for table in self._tables[package]:
            if (variant := table.choices.get(work, "")) in named:
                return variant, table.source
        return next(iter(named)), DEFAULT


def _row_classes(low: int, high: int) -> Iterator[int]:
    """Powers of two that cover `low` to `high`, the last one cut off there."""
    rows = 1 << (low - 1).bit_length()
    while rows < high:
        yield rows
        rows *= 2
    yield high
