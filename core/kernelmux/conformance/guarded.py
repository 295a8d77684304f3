"""Memory that notices: every tensor stands between guard bands, and is filled with poison before a launch.

Enters: values with known extents. Leaves: their planes, and whether anything was written outside them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
    """The planes of one value, or bare bytes, between guard bands."""

    def __init__(self, sizes: list[tuple[tuple[int, ...], torch.dtype]], device: str, band: int = 0) -> None:
        starts, end = [], 0
        for shape, dtype in sizes:
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            between = aligned(max(BAND, band, 2 * nbytes // max(1, min(shape[:2]))))
            starts.append(end + between)
            end += between + aligned(nbytes) + between
        memory = torch.full((end + ALIGNMENT,), GUARD, dtype=torch.uint8, device=device)
        # Tensors have the alignment that a plan gives them; torch's allocator promises less on the CPU.
        self._memory = memory[-memory.data_ptr() % ALIGNMENT :]
        self._spans = []
        parts = []
        for start, (shape, dtype) in zip(starts, sizes, strict=True):
            span = slice(start, start + torch.Size(shape).numel() * dtype.itemsize)
            self._spans.append(span)
            parts.append(self._memory[span].view(dtype).view(shape))
        self.parts = tuple(parts)

    @staticmethod
    def of(value: Value, device: str) -> Guarded:
        """Memory for a value, in its format."""
        planes = lookup(value.format).planes
        return Guarded([(plane.shape(value.extents), torch_dtype(plane.dtype)) for plane in planes], device)

    @staticmethod
    def scratch(nbytes: int, device: str) -> Guarded:
        """Bare bytes."""
        return Guarded([((nbytes,), torch.uint8)], device, band=min(nbytes, MOST))

    @property
    def planes(self) -> Planes:
        """What a kernel is given."""
        return as_planes(self.parts)

    def poison(self, pattern: int) -> None:
        for span in self._spans:
            self._memory[span] = pattern

    def snapshot(self) -> torch.Tensor:
        """The bytes of the planes, copied."""
        return torch.cat([self._memory[span] for span in self._spans])

    def restore(self, snapshot: torch.Tensor) -> None:
        at = 0
        for span in self._spans:
            nbytes = span.stop - span.start
            self._memory[span] = snapshot[at : at + nbytes]
            at += nbytes

    def intact(self) -> bool:
        """Whether every byte outside the planes is as it was."""
        ends = [0, *(span.stop for span in self._spans)]
        starts = [*(span.start for span in self._spans), len(self._memory)]
        return all(bool((self._memory[a:b] == GUARD).all()) for a, b in zip(ends, starts, strict=True))


class Columns(Guarded):
    """A value that is columns of a wider guarded matrix, whose other columns are other values' or stay as they are."""

    def __init__(self, matrix: Guarded, first: int, count: int, shared: bool) -> None:
        self._matrix, self._shared = matrix, shared
        self._columns = slice(first, first + count)
        self.parts = (matrix.parts[0][:, self._columns],)

    @staticmethod
    def side_by_side(values: Sequence[Value], device: str) -> list[Guarded]:
        """Values of one plain format as all columns of one matrix."""
        ends = list(itertools.accumulate(value.extents[1] for value in values))
        matrix = Guarded.of(replace(values[0], shape=(values[0].extents[0], ends[-1])), device)
        starts = [0, *ends]
        return [Columns(matrix, start, v.extents[1], True) for start, v in zip(starts, values, strict=False)]

    @staticmethod
    def apart(value: Value, device: str) -> Guarded:
        """A value with a gap before and after each of its rows."""
        rows, columns = value.extents
        return Columns(Guarded.of(replace(value, shape=(rows, columns + 2 * GAP)), device), GAP, columns, False)

    def poison(self, pattern: int) -> None:
        self.parts[0].view(torch.uint8).fill_(pattern)

    def snapshot(self) -> torch.Tensor:
        return self.parts[0].contiguous().view(torch.uint8).flatten()

    def restore(self, snapshot: torch.Tensor) -> None:
        self.parts[0].copy_(snapshot.view(self.parts[0].dtype).view(self.parts[0].shape))

    def intact(self) -> bool:
        whole = self._matrix.parts[0].view(torch.uint8)
        item = self.parts[0].itemsize
        gaps = (whole[:, : self._columns.start * item], whole[:, self._columns.stop * item :])
        return self._matrix.intact() and (self._shared or all(bool((gap == GUARD).all()) for gap in gaps))


def same(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> bool:
    """Whether tensors are equal byte for byte."""
    return len(before) == len(after) and all(
        (old.shape, old.dtype) == (new.shape, new.dtype) and _bits(old).equal(_bits(new))
        for old, new in zip(before, after, strict=True)
    )


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers, which are equal where their bits are."""
    return tensor.reshape(-1).view(_WORDS[tensor.itemsize])
