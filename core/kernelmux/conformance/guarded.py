"""Memory that notices: every tensor stands between guard bands, and is filled with poison before a launch.

Enters: values with known extents. Leaves: their planes, and whether anything was written outside them.
"""

from __future__ import annotations

import torch

from kernelmux.formats import Value, as_planes, lookup, torch_dtype
from kernelmux.hookspecs import Planes
from kernelmux.memory import aligned

BAND = 256
"""Bytes of a guard band; tensors keep the alignment that a plan gives them."""
GUARD = 0xFF
"""As floats a NaN: what is read from a band shows in the result, even times zero."""
POISONS = (0xFF, 0x7B)
"""Two, so that an element left unwritten shows as a difference; as floats a NaN and a number of no meaning."""


class Guarded:
    """The planes of one value, or bare bytes, between guard bands."""

    def __init__(self, sizes: list[tuple[tuple[int, ...], torch.dtype]], device: str) -> None:
        starts, end = [], BAND
        for shape, dtype in sizes:
            starts.append(end)
            end = aligned(end + torch.Size(shape).numel() * dtype.itemsize) + BAND
        self._memory = torch.full((end,), GUARD, dtype=torch.uint8, device=device)
        self._inside = torch.zeros(end, dtype=torch.bool, device=device)
        parts = []
        for start, (shape, dtype) in zip(starts, sizes, strict=True):
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            self._inside[start : start + nbytes] = True
            parts.append(self._memory[start : start + nbytes].view(dtype).view(shape))
        self.parts = tuple(parts)

    @staticmethod
    def of(value: Value, device: str) -> Guarded:
        """Memory for a value, in its format."""
        planes = lookup(value.format).planes
        return Guarded([(plane.shape(value.extents), torch_dtype(plane.dtype)) for plane in planes], device)

    @staticmethod
    def scratch(nbytes: int, device: str) -> Guarded:
        """Bare bytes."""
        return Guarded([((nbytes,), torch.uint8)], device)

    @property
    def planes(self) -> Planes:
        """What a kernel is given."""
        return as_planes(self.parts)

    def poison(self, pattern: int) -> None:
        self._memory[self._inside] = pattern

    def snapshot(self) -> torch.Tensor:
        """The bytes of the planes, copied."""
        return self._memory[self._inside]

    def restore(self, snapshot: torch.Tensor) -> None:
        self._memory[self._inside] = snapshot

    def intact(self) -> bool:
        """Whether every byte outside the planes is as it was."""
        return bool((self._memory[~self._inside] == GUARD).all())
