"""A model file's bytes: opened once, and read into memory of their own when they are wanted.

Enters: a path. Leaves: a StoredFile, and weights that are read from it. Nothing is mapped: where a mapped file is cut
short the process dies of SIGBUS, and where it is written to numbers change under a kernel. Here both are a ModelError.
"""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, overload
from weakref import finalize

from kernelmux.errors import ModelError
from kernelmux.graph.formats import ALL, ITEM_BYTES, Weight, lookup, planes_of_rows, torch_dtype

if TYPE_CHECKING:
    import torch

LARGEST_READ = 1 << 30
"""Bytes that the system is asked for at once; Linux gives no more than 2 GiB."""

_KINDS = (
    (stat.S_ISDIR, "is a directory"),
    (stat.S_ISFIFO, "is a pipe, and a model is read from several places: save it to a file first"),
    (stat.S_ISSOCK, "is a socket, not a file"),
    (stat.S_ISCHR, "is a device, not a file"),
    (stat.S_ISBLK, "is a device, not a file"),
)
_REASONS: Mapping[int | None, str] = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file: a part of the path is no directory",
    errno.ELOOP: "is a link that leads back to itself",
    errno.ENAMETOOLONG: "the path is too long for the file system",
    errno.EACCES: "no permission to read it",
    errno.EPERM: "no permission to read it",
}


class StoredFile:
    """A regular file that is open for reading, for as long as anybody refers to it; `source` is how messages call it.

    ModelError where there is none, or it cannot be read: what it is instead, in words. What was renamed over or deleted
    meanwhile is still the file that was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source = str(path)
        try:
            # Without O_NONBLOCK a pipe would wait for somebody to write to it.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
        except (OSError, ValueError) as error:
            raise self.fault(_reason(error)) from error
        finalize(self, os.close, self._descriptor)
        found = os.fstat(self._descriptor)
        for is_kind, words in _KINDS:
            if is_kind(found.st_mode):
                raise self.fault(words)
        if found.st_size == 0:
            raise self.fault("is empty, 0 bytes; fetch it again")
        self.size = found.st_size
        self.stamp = (found.st_size, found.st_mtime_ns)
        """The file's size, and when it was last changed, in nanoseconds."""

    def fault(self, message: str) -> ModelError:
        """What is wrong with the file."""
        return ModelError(f"{self.source}: {message}", file=self.source)

    def read_into(self, start: int, room: memoryview) -> None:
        """Fills `room` with the bytes from `start` on; ModelError where they are not there any more, or others."""
        done = 0
        while done < len(room):
            try:
                count = os.preadv(self._descriptor, [room[done : done + LARGEST_READ]], start + done)
            except OSError as error:
                raise self.fault(_reason(error)) from error
            if not count:
                break
            done += count
        self._check(start + done if done < len(room) else None)

    def read(self, start: int, size: int) -> bytearray:
        """So many bytes from `start` on."""
        room = bytearray(size)
        self.read_into(start, memoryview(room))
        return room

    def _check(self, end: int | None) -> None:
        """ModelError where the file is not what was opened; `end` is the byte that was not there."""
        found = os.fstat(self._descriptor)
        if end is not None or found.st_size < self.size:
            now = found.st_size if end is None else end
            raise self.fault(f"has become shorter since it was opened: {now} bytes of {self.size}; fetch it again")
        if (found.st_size, found.st_mtime_ns) != self.stamp:
            raise self.fault("was written to since it was opened; load it again")


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return _REASONS.get(error.errno) or f"cannot be read: {error.strerror or error}"
    return f"no such file: {error}"


class StackedBytes:
    """Planes of one size, read one after another as a file of them all would be."""

    def __init__(self, planes: Sequence[StoredPlane]) -> None:
        self._planes = tuple(planes)
        self._size = planes[0].nbytes
        self.sources = tuple(source for plane in planes for source in plane.sources)

    def read_into(self, start: int, room: memoryview) -> None:
        """Fills `room` with the bytes from `start` on."""
        while len(room):
            number, first = divmod(start, self._size)
            count = min(len(room), self._size - first)
            self._planes[number].read_into(first, room[:count])
            start, room = start + count, room[count:]


class MadeBytes:
    """A tensor that is made of what files hold when it is first read, and let go when all of it has been.

    Whoever sends it to a device reads it piece by piece, in several threads. `make` is given the tensors of planes.
    """

    def __init__(self, planes: Sequence[StoredPlane], make: Callable[..., torch.Tensor]) -> None:
        self.sources = tuple(source for plane in planes for source in plane.sources)
        self._planes = tuple(planes)
        self._make = make
        self._lock = Lock()
        self._made: torch.Tensor | None = None
        self._left = 0

    def read_into(self, start: int, room: memoryview) -> None:
        """Fills `room` with the bytes from `start` on."""
        import torch

        with self._lock:
            if self._made is None:
                made = self._make(*(plane.tensor() for plane in self._planes))
                self._made = made.contiguous().view(-1).view(torch.uint8)
                self._left = self._made.nbytes
            made = self._made
            self._left -= len(room)
            if self._left <= 0:
                self._made = None
        room[:] = made[start : start + len(room)].numpy().data


@dataclass(frozen=True)
class StoredPlane:
    """One plane of a weight as it lies in a file: `shape` of `dtype` (torch's name for it) from byte `offset` on."""

    file: StoredFile | StackedBytes | MadeBytes
    offset: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def sources(self) -> tuple[StoredPlane, ...]:
        """What lies in files as it is: the plane itself, or those that it is made of."""
        return (self,) if isinstance(self.file, StoredFile) else self.file.sources

    def read_into(self, start: int, room: memoryview) -> None:
        """Fills `room` with the plane's bytes from its byte `start` on."""
        self.file.read_into(self.offset + start, room)

    def read(self, start: int, size: int) -> bytearray:
        """So many of the plane's bytes, from its byte `start` on."""
        room = bytearray(size)
        self.read_into(start, memoryview(room))
        return room

    def rows(self, taken: slice) -> StoredPlane:
        """Some rows of the plane, which lie one after another."""
        height, *columns = self.shape
        size = self.nbytes // height
        count = taken.stop - taken.start
        return replace(self, offset=self.offset + taken.start * size, shape=(count, *columns), nbytes=count * size)

    def tensor(self) -> torch.Tensor:
        """The plane in memory of its own, read now."""
        import torch

        whole = torch.empty(self.nbytes, dtype=torch.uint8)
        self.read_into(0, whole.numpy().data)
        return whole.view(torch_dtype(self.dtype)).view(self.shape)


def made_plane(
    dtype: str, shape: tuple[int, ...], planes: Sequence[StoredPlane], make: Callable[..., torch.Tensor]
) -> StoredPlane:
    """A plane of that dtype and shape, which `make` makes of the tensors of others when it is read."""
    return StoredPlane(MadeBytes(planes, make), 0, dtype, shape, ITEM_BYTES[dtype] * math.prod(shape))


class StoredWeight(Weight):
    """A weight whose `planes` are read from its file each time that they are asked for; `loaded` keeps them."""

    def __init__(self, name: str, shape: tuple[int, ...], format: str, planes: tuple[Any, ...]) -> None:
        """`planes` are StoredPlane, or tensors, as where `dataclasses.replace` gives those of some rows."""
        for field, value in {"name": name, "shape": shape, "format": format, "stored": planes}.items():
            object.__setattr__(self, field, value)

    stored: tuple[StoredPlane | torch.Tensor, ...]

    @property
    def planes(self) -> tuple[torch.Tensor, ...]:
        return tuple(plane.tensor() if isinstance(plane, StoredPlane) else plane for plane in self.stored)


def loaded(weight: Weight) -> Weight:
    """The weight with its planes in memory, to be read no more than this once."""
    return Weight(weight.name, weight.shape, weight.format, weight.planes)


@overload
def renamed(weight: StoredWeight, name: str) -> StoredWeight: ...


@overload
def renamed(weight: Weight, name: str) -> Weight: ...


def renamed(weight: Weight, name: str) -> Weight:
    """The weight under another name, read when it is asked for where the given one is."""
    if isinstance(weight, StoredWeight):
        return StoredWeight(name, weight.shape, weight.format, weight.stored)
    return replace(weight, name=name)


def rows_of(weight: Weight, name: str, taken: slice) -> Weight:
    """Some rows of a matrix as a weight of that name, which is read when it is asked for where the whole one is.

    `taken` starts at a multiple of the format's block of rows.
    """
    shape = (taken.stop - taken.start, *weight.shape[1:])
    if not isinstance(weight, StoredWeight):
        return Weight(name, shape, weight.format, planes_of_rows(weight.format, weight.planes, taken))
    parts: list[StoredPlane | torch.Tensor] = []
    for part, plane in zip(weight.stored, lookup(weight.format).planes, strict=True):
        rows = slice(taken.start // (plane.rows or 1), -(-taken.stop // (plane.rows or 1)))
        parts.append(part if plane.rows == ALL else part.rows(rows) if isinstance(part, StoredPlane) else part[rows])
    return StoredWeight(name, shape, weight.format, tuple(parts))


def stacked_weight(name: str, parts: Sequence[StoredWeight]) -> StoredWeight:
    """Weights of one shape and format, whose planes lie in files, as one weight with one more axis."""
    stacked = []
    for each in zip(*(part.stored for part in parts), strict=True):
        planes = [plane for plane in each if isinstance(plane, StoredPlane)]
        shape, nbytes = (len(planes), *planes[0].shape), len(planes) * planes[0].nbytes
        stacked.append(StoredPlane(StackedBytes(planes), 0, planes[0].dtype, shape, nbytes))
    return StoredWeight(name, (len(parts), *parts[0].shape), parts[0].format, tuple(stacked))


def flattened(weight: Weight) -> Weight:
    """A weight of matrices, or vectors, as one of all their rows, one's after another's.

    Of formats whose rows share scales, matrices are of whole blocks of rows.
    """
    first, *inner = weight.shape
    flat = (first * inner[0], *inner[1:])
    shapes = [plane.shape(flat) for plane in lookup(weight.format).planes]
    if isinstance(weight, StoredWeight):
        stored = zip(weight.stored, shapes, strict=True)
        planes = [replace(p, shape=s) if isinstance(p, StoredPlane) else p.view(s) for p, s in stored]
        return StoredWeight(weight.name, flat, weight.format, tuple(planes))
    viewed = tuple(part.view(shape) for part, shape in zip(weight.planes, shapes, strict=True))
    return Weight(weight.name, flat, weight.format, viewed)
