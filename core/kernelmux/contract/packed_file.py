"""A packed form as a file: a header that says how its planes lie, then the planes, each at a multiple of 4096 bytes.

Enters: planes in whatever memory; or a file of whatever origin. Leaves: the file; or the form, mapped copy-on-write.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from kernelmux.contract.checksum import CHUNK, checksum, hex_checksum
from kernelmux.graph.formats import torch_dtype

if TYPE_CHECKING:
    import torch

    from kernelmux.contract.packed import Form

LAYOUT = 1
MAGIC = b"kernelmux packed weights "
"""Then the layout's number and a new line, the hash of the header's text, its length, and the text, as JSON."""
_START = struct.Struct("<32sQ")
ALIGNMENT = 4096
"""Of the planes in the file: that of a page."""
PIECE = 2**24
"""Bytes, whole chunks of the checksum, that are written at once: as many more as the writer needs of host memory."""


class UnusableError(Exception):
    """Why a file is not the form that was looked for, as a clause without the file's name."""


@dataclass(frozen=True)
class _Plane:
    """How one plane lies in the file, and as a tensor."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    nbytes: int
    checksum: str = "0" * 16


@dataclass(frozen=True, eq=False)
class MappedForm:
    """A packed form whose planes are bytes, in the mapped file or on a device, and still to be checked."""

    name: Form
    planes: tuple[torch.Tensor, ...]
    stored: tuple[_Plane, ...]

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.stored)

    def on(self, device: str) -> MappedForm:
        """The same on a device; itself where that is host memory."""
        return replace(self, planes=tuple(plane.to(device) for plane in self.planes))

    @property
    def fault(self) -> str:
        """What is damaged, by a look at every byte; "" where nothing is."""
        for number, (plane, stored) in enumerate(zip(self.planes, self.stored, strict=True)):
            if hex_checksum(checksum(plane)) != stored.checksum:
                return f"plane {number} is damaged"
        return ""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The planes as they were kept: views."""
        return tuple(
            plane.view(torch_dtype(stored.dtype)).as_strided(stored.shape, stored.stride)
            for plane, stored in zip(self.planes, self.stored, strict=True)
        )


def flat_bytes(plane: torch.Tensor) -> torch.Tensor | None:
    """A tensor's bytes in the order in which they lie, as a view; None where they have gaps or overlap."""
    import torch

    if plane.layout != torch.strided:
        return None
    expected = 1
    for stride, extent in sorted(zip(plane.stride(), plane.shape, strict=True)):
        if extent > 1 and plane.numel():
            if stride != expected:
                return None
            expected *= extent
    return plane.as_strided((plane.numel(),), (1,)).view(torch.uint8)


def write_form(
    file: BinaryIO, key: str, name: Form, planes: Sequence[torch.Tensor], go_on: Callable[[], object]
) -> None:
    """Writes a form whose planes have `flat_bytes`; `go_on` is called before each piece, and may raise."""
    stored = _stored(key, name, planes)
    end = len(_header(key, name, stored))
    for number, (plane, each) in enumerate(zip(planes, stored, strict=True)):
        file.seek(each.offset)
        data, total = flat_bytes(plane), 0
        assert data is not None
        for start in range(0, each.nbytes, PIECE):
            go_on()
            piece = data[start : start + PIECE].cpu()
            total += int(checksum(piece, start // (8 * CHUNK)))
            file.write(piece.numpy().data)
        stored[number] = replace(each, checksum=f"{total % 2**64:016x}")
        end = each.offset + each.nbytes
    file.truncate(end)
    file.seek(0)
    file.write(_header(key, name, stored))


def _stored(key: str, name: Form, planes: Sequence[torch.Tensor]) -> list[_Plane]:
    """How planes are going to lie: the header is as long whatever the offsets and checksums in it."""
    stored = [
        _Plane(str(p.dtype).removeprefix("torch."), tuple(p.shape), p.stride(), 0, p.numel() * p.itemsize)
        for p in planes
    ]
    end = len(_header(key, name, stored))
    for number, each in enumerate(stored):
        stored[number] = replace(each, offset=-(-end // ALIGNMENT) * ALIGNMENT)
        end = stored[number].offset + each.nbytes
    return stored


def _header(key: str, name: Form, stored: Sequence[_Plane]) -> bytes:
    rows = [[p.dtype, p.shape, p.stride, f"{p.offset:016x}", f"{p.nbytes:016x}", p.checksum] for p in stored]
    text = json.dumps({"key": key, "weights": name[0], "form": name[1], "planes": rows}).encode()
    return MAGIC + b"%d\n" % LAYOUT + _START.pack(hashlib.sha256(text).digest(), len(text)) + text


def map_form(path: Path, key: str, name: Form) -> MappedForm:
    """The form in a file; UnusableError says why it is not in there, FileNotFoundError and other OSErrors are raised.

    What the header says is checked against its hash and the file's size, the planes' bytes are not.
    """
    with path.open("rb") as file:
        header = _read_header(file)
        begin = file.tell()
        size = os.fstat(file.fileno()).st_size
    if header["key"] != key:
        raise UnusableError("it holds another form")
    stored = tuple(
        _Plane(dtype, tuple(shape), tuple(stride), int(offset, 16), int(nbytes, 16), checksum)
        for dtype, shape, stride, offset, nbytes, checksum in header["planes"]
    )
    end = max((plane.offset + plane.nbytes for plane in stored), default=begin)
    if size != end:
        raise UnusableError(f"it has {size} bytes of {end}")
    return MappedForm(name, tuple(_mapped(path, size, stored)), stored)


def _mapped(path: Path, size: int, stored: Sequence[_Plane]) -> Iterator[torch.Tensor]:
    import torch

    try:
        # Copy-on-write, and without a descriptor that stays open: a model has more forms than a process may have.
        whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except RuntimeError as error:
        # Another process may have deleted it just now.
        raise OSError(str(error)) if path.exists() else FileNotFoundError(path) from error
    for plane in stored:
        yield whole[plane.offset : plane.offset + plane.nbytes]


def _read_header(file: BinaryIO) -> dict[str, Any]:
    ours = MAGIC + b"%d\n" % LAYOUT
    found = file.read(len(ours))
    if found != ours:
        raise UnusableError("it is of another layout" if found.startswith(MAGIC) else "it is no file of packed weights")
    try:
        digest, length = _START.unpack(file.read(_START.size))
    except struct.error:
        raise UnusableError("it is truncated") from None
    text = file.read(min(length, ALIGNMENT * ALIGNMENT))
    if hashlib.sha256(text).digest() != digest:
        raise UnusableError("its header is damaged")
    header: dict[str, Any] = json.loads(text)
    return header
