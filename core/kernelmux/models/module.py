"""The tensors of one module of a folder, which together are its weight: taken one by one, or refused by name.

Enters: where tensors lie, by the ends of their names. Leaves: those that are asked for; ModelError names the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from kernelmux.errors import ModelError, shown
from kernelmux.models.stored import StoredPlane

ANY = 0
"""An extent that a tensor may have as it likes."""


@dataclass
class Module:
    """A module's tensors; those that are taken are gone."""

    path: Path
    name: str
    parts: dict[str, StoredPlane]

    def fail(self, says: str) -> NoReturn:
        """ModelError about the module."""
        raise ModelError(f"{self.path}: module {shown(self.name)}: {says}", file=str(self.path))

    def take(self, *ends: str) -> StoredPlane:
        """The tensor whose name ends so, the first that there is of several; ModelError where there is none."""
        for end in ends:
            if end in self.parts:
                return self.parts.pop(end)
        others = f", of a module with {', '.join(self.parts)}" if self.parts else ""
        self.fail(f"tensor {' or '.join(ends)} is missing{others}")

    def take_shaped(self, end: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> StoredPlane:
        """The same of a tensor that has one of these dtypes and one of these shapes, an extent of which is ANY."""
        plane = self.take(end)
        if plane.dtype not in dtypes or not any(_fits(plane.shape, shape) for shape in shapes):
            told = (str([extent or "any" for extent in shape]).replace("'", "") for shape in shapes)
            needed = f"{' or '.join(dtypes)} {' or '.join(told)} is read"
            self.fail(f"tensor {end} is {plane.dtype} {list(plane.shape)}; {needed}")
        return plane


def _fits(shape: tuple[int, ...], needed: tuple[int, ...]) -> bool:
    return len(shape) == len(needed) and all(n in (ANY, extent) for extent, n in zip(shape, needed, strict=True))
