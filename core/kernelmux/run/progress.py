"""How far a preparation has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """So much of a stage is done: bytes where it packs, maps or quantises, else forms, launches or steps."""

    stage: str
    done: int
    total: int

    @property
    def counts_bytes(self) -> bool:
        return self.stage in (MAPPING, PACKING, QUANTISING)


LOOKING_UP, MAPPING = "looking up packed weights", "mapping packed weights"
PLACING, PACKING, COMPILING = "placing steps", "packing weights", "compiling kernels"
BINDING, CAPTURING = "binding steps", "capturing steps"
QUANTISING = "quantising"
