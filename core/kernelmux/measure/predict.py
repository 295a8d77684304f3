"""How long a kernel is going to take: as it was measured on such a device, else by its cost and what it declares.

Enters: a kernel with its node at some rows, tables, the device's ceilings. Leaves: microseconds, and where they are
known from. Nothing is measured here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kernelmux.contract.device import Ceilings, Device
from kernelmux.contract.kernel import Kernel
from kernelmux.graph.graph import TensorNode
from kernelmux.measure.table import Tables
from kernelmux.measure.works import Batch, Work

CONTEXT = 512
"""Cached tokens of each sequence that decodes, where nobody says otherwise."""


@dataclass(frozen=True)
class Prediction:
    """Microseconds of one call, and where they are known from."""

    us: float
    source: str
    declared: bool = False
    """Whether it is by the kernel's own account, not by measurement."""

    def __str__(self) -> str:
        return f"{self.us:.3g} us ({self.source})"


@dataclass(frozen=True)
class Predictor:
    """Predicts for one device, with sequences of `context` cached tokens."""

    device: Device
    tables: Tables
    context: int = CONTEXT

    @cached_property
    def ceilings(self) -> Ceilings:
        return self.device.platform.ceilings(self.device)

    def of(self, kernel: Kernel, node: TensorNode, rows: int) -> Prediction:
        """Of a node at so many rows, its weights packed as the kernel packs them."""
        batch = Batch.of(rows, self.context)
        work = Work("", node.resolve(batch.dims), batch)
        if (measured := self.tables.time(kernel, work.node, rows)) is not None:
            return Prediction(*measured)
        return self._declared(kernel, work)

    def _declared(self, kernel: Kernel, work: Work) -> Prediction:
        efficiency, ceilings = kernel.reaches(work.node), self.ceilings
        packed = kernel.packed_bytes(work.node)
        stored = sum(value.nbytes for value in work.node.weights)
        rows_only = work.node.op == "embed"
        moved = work.nbytes(work.node) + (0 if rows_only or not packed else packed - stored)
        flops = ceilings.gemm.get(efficiency.arithmetic, min(ceilings.gemm.values()))
        reading = moved / (ceilings.read * efficiency.reading)
        multiplying = work.flops() / (flops * efficiency.multiplying)
        seconds = max(reading, multiplying) + kernel.launches * ceilings.launch
        bound = "reading" if reading >= multiplying else f"{efficiency.arithmetic} arithmetic"
        return Prediction(seconds * 1e6, f"declared, bound by {bound}", declared=True)
