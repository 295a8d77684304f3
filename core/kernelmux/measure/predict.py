"""How long a kernel is going to take: as it was measured on such a device, else by its cost and what it declares.

Enters: a kernel with its node at some rows, tables, the device's ceilings. Leaves: microseconds, and where they are
known from. Nothing is measured here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cached_property

from kernelmux.contract.device import Ceilings, Device
from kernelmux.contract.kernel import Kernel
from kernelmux.graph.graph import TensorNode
from kernelmux.measure.steps import Storing, storing
from kernelmux.measure.table import Tables
from kernelmux.measure.works import Batch, Work, stored_as

CONTEXT = 512
"""Cached tokens of each sequence that decodes, where nobody says otherwise."""
BEYOND = 4
"""Of so many times as many rows as were measured, or as few, a measurement tells nothing."""
SHIPPED = re.compile(r"shipped for (.+?)(?: at [\dx.]+)?(?:, from \d+ rows)?$")
"""What the source of a shipped table's times says: the card, and the size where it is another."""


@dataclass(frozen=True)
class Prediction:
    """Microseconds of one call in a step, and where they are known from."""

    us: float
    source: str
    declared: bool = False
    """Whether it is by the kernel's own account, not by measurement."""
    elsewhere: str = ""
    """The card that was measured, where it is another."""

    def __str__(self) -> str:
        return f"{human_time(self.us)} ({self.source})"


@dataclass(frozen=True)
class Least:
    """Microseconds that one call takes at least, at the device's ceilings: of its reading, products and launches."""

    reading: float
    multiplying: float
    launching: float
    arithmetic: str
    """The format whose GEMM is the ceiling of its products."""

    @property
    def us(self) -> float:
        """Of the call: it reads and multiplies at the same time."""
        return max(self.reading, self.multiplying) + self.launching

    @property
    def bound(self) -> str:
        """What bounds its work beside launches: `reading`, or `bf16 arithmetic`."""
        return "reading" if self.reading >= self.multiplying else f"{self.arithmetic} arithmetic"


@dataclass(frozen=True)
class Predictor:
    """Predicts for one device, with sequences of `context` cached tokens."""

    device: Device
    tables: Tables
    context: int = CONTEXT
    _works: dict[tuple[TensorNode, int], Work] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def ceilings(self) -> Ceilings:
        return self.device.platform.ceilings(self.device)

    def of(self, kernel: Kernel, node: TensorNode, rows: int) -> Prediction:
        """Of a node at so many rows, its weights packed as the kernel packs them, its values as those it is timed with.

        What was measured lacks the gap between the launches of a step, which the device's ceilings state.
        """
        if (measured := self.tables.time(kernel, self._work(node, rows).node, rows, self.context)) is None:
            return self._declared(kernel, node, rows)
        known, source = measured
        us = known.us
        if known.rows and max(rows, known.rows) > BEYOND * min(rows, known.rows):
            return self._declared(kernel, node, rows)
        if known.rows:
            # Beyond the row counts that were measured it grows as the kernel declares.
            us *= self._declared(kernel, node, rows).us / self._declared(kernel, node, known.rows).us
            source += f", from {known.rows} rows"
        found = self._moved(kernel, self._work(node, rows), us, source)
        gap = 0.0 if kernel.chain else self.ceilings.gap
        return replace(found, us=found.us + kernel.launches * gap * 1e6)

    def _declared(self, kernel: Kernel, node: TensorNode, rows: int) -> Prediction:
        work = self._work(node, rows)
        timed = stored_as(work.node, kernel, self.device.platform.activations)
        least, reaches = least_of(kernel, work, timed, self.ceilings), kernel.reaches(work.node)
        slowed = replace(
            least, reading=least.reading / reaches.reading, multiplying=least.multiplying / reaches.multiplying
        )
        return Prediction(slowed.us, f"declared, bound by {slowed.bound}", declared=True)

    def storing(self, kernel: Kernel, node: TensorNode, rows: int) -> tuple[tuple[Storing, ...], tuple[Storing, ...]]:
        """What each format of each input and output adds to that."""
        return storing(kernel, node, rows, self.device.platform.activations, self.ceilings.copy)

    def in_step(self, kernel: Kernel, node: TensorNode, rows: int) -> Prediction:
        """Of a plan's node, whose values have their final formats."""
        found, (reads, writes) = self.of(kernel, node, rows), self.storing(kernel, node, rows)
        ports = [*zip(node.inputs, reads, strict=True), *zip(node.outputs, writes, strict=True)]
        return replace(found, us=found.us + sum(costs[value.format] for value, costs in ports))

    def least(self, kernel: Kernel, node: TensorNode, rows: int) -> Least:
        """What bounds a node at so many rows, however well its kernel is written."""
        work = self._work(node, rows)
        return least_of(kernel, work, work.node, self.ceilings)

    def _moved(self, kernel: Kernel, work: Work, us: float, source: str) -> Prediction:
        """A measured time; of another card in the proportion of what both take at least."""
        shipped = SHIPPED.match(source)
        if shipped is None or shipped[1] == self.device.name:
            return Prediction(us, source)
        elsewhere = self.device.platform.ceilings(replace(self.device, name=shipped[1]))
        here, there = (least_of(kernel, work, work.node, ceilings).us for ceilings in (self.ceilings, elsewhere))
        share = here / there
        return Prediction(us * share, f"{source}, in proportion", elsewhere=shipped[1])

    def _work(self, node: TensorNode, rows: int) -> Work:
        """The node at so many rows: one for all kernels that are asked about it."""
        key = node, rows
        if key not in self._works:
            batch = Batch.of(rows, self.context)
            self._works[key] = Work("", node.resolve(batch.dims), batch)
        return self._works[key]


def least_of(kernel: Kernel, work: Work, node: TensorNode, ceilings: Ceilings) -> Least:
    """What bounds a work's node as a kernel stores its values."""
    arithmetic = kernel.reaches(node).arithmetic
    flops = ceilings.gemm.get(arithmetic, min(ceilings.gemm.values()))
    launch = ceilings.chained if kernel.chain else ceilings.launch
    reading, multiplying = moved_bytes(kernel, work, node) / ceilings.read, work.flops / flops
    return Least(reading * 1e6, multiplying * 1e6, kernel.launches * launch * 1e6, arithmetic)


def moved_bytes(kernel: Kernel, work: Work, node: TensorNode) -> int:
    """Bytes that a work's node reads and writes at least, its weights as a kernel packs them."""
    packed = kernel.packed_bytes(node)
    stored = sum(value.nbytes for value in node.weights)
    rows_only = node.op == "embed"
    return work.nbytes(node) + (0 if rows_only or not packed else packed - stored)


def human_time(us: float) -> str:
    """`9.14 us`, `1.15 ms`, `64.4 s`."""
    for unit in ("us", "ms"):
        if us < 999.5:
            return f"{us:.3g} {unit}"
        us /= 1e3
    return f"{us:.3g} s"
