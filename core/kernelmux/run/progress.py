"""How far a preparation has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """So much of a stage is done: bytes where it packs, else launches or steps."""

    stage: str
    done: int
    total: int

    @property
    def counts_bytes(self) -> bool:
        return self.stage == PACKING


PACKING, COMPILING, BINDING, CAPTURING = "packing weights", "compiling kernels", "binding steps", "capturing steps"
