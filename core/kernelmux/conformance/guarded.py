"""Memory that notices: every tensor stands between guard bands, and is filled with poison before a launch.

Enters: values with known extents. Leaves: their planes, and whether anything was written outside them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from kernelmux.contract.kernel import Planes
from kernelmux.graph.formats import ALIGNMENT, Value, aligned, as_planes, lookup, torch_dtype

BAND = 256
"""Bytes of a guard band at least; it holds two rows and two columns, so that one too many ends in it."""
MOST = 2**20
"""Bytes of the band beside bare bytes at most: there it is as long as they are."""
GAP = 16
"""Elements before and after each row of a value whose rows lie apart."""
GUARD = 0xFF
"""As floats a NaN: what is read from a band shows in the result, even times zero."""
POISONS = (0xFF, 0x7B)
"""Two, so that an element left unwritten shows as a difference; as floats a NaN and a number of no meaning."""


class Guarded:
    """The planes of one value, or bare bytes, in memory that is all guard bands but for what values own of it."""

    def __init__(
        self, memory: torch.Tensor, parts: Sequence[torch.Tensor], owned: Sequence[torch.Tensor] | None = None
    ) -> None:
        """`owned` are the parts of every value that lies in the memory, where this is not the only one."""
        self._memory, self.parts = memory, tuple(parts)
        self._owned = self.parts if owned is None else tuple(owned)

    @staticmethod
    def of(value: Value, device: str) -> Guarded:
        """Memory for a value, in its format."""
        planes = lookup(value.format).planes
        return _between_bands([(plane.shape(value.extents), torch_dtype(plane.dtype)) for plane in planes], device)

    @staticmethod
    def scratch(nbytes: int, device: str) -> Guarded:
        """Bare bytes."""
        return _between_bands([((nbytes,), torch.uint8)], device, band=min(nbytes, MOST))

    @staticmethod
    def side_by_side(values: Sequence[Value], device: str) -> list[Guarded]:
        """Values of one plain format as all columns of one matrix."""
        widths = [value.extents[1] for value in values]
        whole = Guarded.of(replace(values[0], shape=(values[0].extents[0], sum(widths))), device)
        return [Guarded(whole._memory, [part], whole.parts) for part in torch.split(whole.parts[0], widths, dim=1)]

    @staticmethod
    def apart(value: Value, device: str) -> Guarded:
        """A value of a plain format with a gap before and after each of its rows."""
        rows, columns = value.extents
        whole = Guarded.of(replace(value, shape=(rows, columns + 2 * GAP)), device)
        return Guarded(whole._memory, [whole.parts[0][:, GAP : GAP + columns]])

    @property
    def planes(self) -> Planes:
        """What a kernel is given."""
        return as_planes(self.parts)

    def poison(self, pattern: int) -> None:
        for part in self.parts:
            part.view(torch.uint8).fill_(pattern)

    def snapshot(self) -> torch.Tensor:
        """The bytes of the planes, copied."""
        return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in self.parts])

    def restore(self, snapshot: torch.Tensor) -> None:
        held = torch.split(snapshot, [part.nbytes for part in self.parts])
        for part, old in zip(self.parts, held, strict=True):
            target = part.view(torch.uint8)
            target.copy_(old.view(target.shape))

    def overwritten(self) -> str:
        """How many bytes outside the planes are not as they were, and where; empty where all are."""
        held = [part.clone() for part in self._owned]
        for part in self._owned:
            part.view(torch.uint8).fill_(GUARD)
        changed = self._memory != GUARD
        for part, old in zip(self._owned, held, strict=True):
            part.copy_(old)
        if not bool(changed.any()):
            return ""
        places = changed.nonzero().flatten()
        away = [(int(distance.min()), side) for distance, side in self._distances(places) if len(distance)]
        nearest, side = min(away, default=(0, "between the rows"))
        said = "1 byte was" if len(places) == 1 else f"{len(places)} bytes were"
        return f"{said} overwritten {side}" + (f", the nearest {nearest} bytes away" if nearest else "")

    def _distances(self, places: torch.Tensor) -> Iterator[tuple[torch.Tensor, str]]:
        """How many bytes places are away from each plane that lies in one piece, on either side."""
        for part in self.parts:
            if part.is_contiguous():
                start = part.data_ptr() - self._memory.data_ptr()
                yield start - 1 - places[places < start], "before it"
                yield places[places >= start + part.nbytes] - start - part.nbytes, "after it"


def _between_bands(sizes: Sequence[tuple[tuple[int, ...], torch.dtype]], device: str, band: int = 0) -> Guarded:
    """Tensors of these sizes, each after and before a band of its own, of at least `band` bytes."""
    spans, end = [], 0
    for shape, dtype in sizes:
        nbytes = math.prod(shape) * dtype.itemsize
        between = aligned(max(BAND, band, 2 * nbytes // max(1, min(shape[:2]))))
        spans.append(slice(end + between, end + between + nbytes))
        end += between + aligned(nbytes) + between
    memory = torch.full((end + ALIGNMENT,), GUARD, dtype=torch.uint8, device=device)
    # Tensors have the alignment that a plan gives them; torch's allocator promises less on the CPU.
    memory = memory[-memory.data_ptr() % ALIGNMENT :]
    return Guarded(
        memory, [memory[span].view(dtype).view(shape) for span, (shape, dtype) in zip(spans, sizes, strict=True)]
    )


def same(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> bool:
    """Whether tensors are equal byte for byte."""
    return len(before) == len(after) and all(
        (old.shape, old.dtype) == (new.shape, new.dtype) and bits(old).equal(bits(new))
        for old, new in zip(before, after, strict=True)
    )


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers, which are equal where their bits are."""
    return tensor.reshape(-1).view(_WORDS[tensor.itemsize])


def holding(tensor: torch.Tensor, pattern: int) -> torch.Tensor:
    """Which elements are made of that byte alone."""
    return (tensor.contiguous().view(torch.uint8).view(*tensor.shape, tensor.itemsize) == pattern).all(dim=-1)
