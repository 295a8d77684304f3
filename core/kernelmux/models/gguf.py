"""Reads a GGUF file: metadata as plain Python values, weights as views of the mapped file.

Enters: a path. Leaves: a ModelFile, its tensors mapped copy-on-write and never copied. Every count, length and extent
is checked against the size of the file before it is used; the gguf package's own reader trusts the header, and takes
seconds for a vocabulary. What a model needs (keys, tensors, a tokenizer) is not judged here.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from kernelmux.errors import ModelError, shown
from kernelmux.files import MAGIC
from kernelmux.graph.formats import Format, Weight, gguf_formats

VERSIONS = (2, 3)
MOST_DIMENSIONS = 4
LONGEST_HEADER = 1 << 26
"""Bytes. The largest vocabularies with their merges take a few tens of MB; what claims more is damage."""

# The numbers that a metadata value's type may have, with struct's letter for each.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9
_LENGTH = struct.Struct("<Q")
# The shortest entry: an empty name, then a type and one byte of value; or a type, no dimension and an offset.
_LEAST_PAIR_BYTES = 8 + 4 + 1
_LEAST_TENSOR_BYTES = 8 + 4 + 4 + 8


@dataclass(frozen=True, eq=False)
class ModelFile:
    """A model as its file states it: metadata by key, weights by tensor name, in the file's order."""

    path: Path
    metadata: Mapping[str, Any]
    weights: Mapping[str, Weight]
    stamp: tuple[int, int] | None = None
    """The file's size, and when it was last changed, in nanoseconds; None where there is no file."""
    pairing: Literal["adjacent", "halves"] | None = None
    """Which elements of a head turn together, where that is not what GGUF stores of the architecture."""

    def fault(self, message: str) -> ModelError:
        """What is wrong with the file."""
        return ModelError(f"{self.path}: {message}", file=str(self.path))


@dataclass(frozen=True)
class _Tensor:
    """One row of the tensor table; `offset` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    format: Format
    offset: int


def read(path: str | os.PathLike[str]) -> ModelFile:
    """The model in a GGUF file (version 2 or 3, little-endian, one part); ModelError at the first fault."""
    path = Path(path)
    data, stamp = _mapped(path)
    header = _Header(str(path), data)
    tensors, pairs = _opening(header)
    metadata = _metadata(header, pairs)
    alignment = _alignment(header, metadata)
    table = _table(header, tensors)
    start = _padded(header.at, alignment)
    return ModelFile(path, metadata, _weights(header, table, start, alignment), stamp)


def _mapped(path: Path) -> tuple[mmap.mmap, tuple[int, int]]:
    """The file's bytes, and its stamp."""
    if path.is_dir():
        raise ModelError(f"{path}: is a directory, not a GGUF file; name the .gguf file in it", file=str(path))
    if not path.is_file():
        raise ModelError(f"{path}: no such file", file=str(path))
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if found.st_size == 0:
                raise ModelError(f"{path}: is empty, 0 bytes; fetch it again", file=str(path))
            # Copy-on-write, for torch warns of a tensor over memory that it may not write to.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), (found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}", file=str(path)) from error


class _Header:
    """A position in the header, which moves on only over bytes that are there."""

    def __init__(self, source: str, data: mmap.mmap) -> None:
        self.source = source
        self.data = data
        self.at = 0
        self.end = min(len(data), LONGEST_HEADER)

    def fail(self, where: str, found: str) -> NoReturn:
        raise ModelError(f"{self.source}: {where}: {found}", file=self.source)

    def numbers(self, letters: str, where: str, count: int = 1) -> tuple[Any, ...]:
        """`count` times the numbers of struct's `letters`."""
        size = count * struct.calcsize(f"<{letters}")
        if size > self.end - self.at:
            self.overrun(where, size)
        self.at += size
        return struct.unpack_from(f"<{letters if count == 1 else f'{count}{letters}'}", self.data, self.at - size)

    def texts(self, where: str, count: int = 1) -> list[str]:
        """`count` strings, each a 64-bit length and then UTF-8."""
        if count > (self.end - self.at) // _LENGTH.size:
            self.overrun(where, count * _LENGTH.size)
        data, end, at = self.data, self.end, self.at  # locals: a vocabulary is a hundred thousand turns of this loop
        found = []
        for _ in range(count):
            start = at + _LENGTH.size
            if start > end:
                self.overrun(where, _LENGTH.size, at)
            (length,) = _LENGTH.unpack_from(data, at)
            at = start + length
            if at > end:
                self.overrun(where, length, start)
            try:
                found.append(data[start:at].decode())
            except UnicodeDecodeError as error:
                self.fail(where, f"text at byte {start} is not UTF-8 ({error.reason}); the file is damaged")
        self.at = at
        return found

    def overrun(self, where: str, size: int, at: int | None = None) -> NoReturn:
        limit = "the end of the file" if self.end == len(self.data) else "the longest header that is read"
        at = self.at if at is None else at
        self.fail(where, f"{size} bytes at byte {at} run past {limit} ({self.end}); it is truncated or damaged")


def _opening(header: _Header) -> tuple[int, int]:
    """How many tensors and how many metadata pairs the file states."""
    magic = header.data[: len(MAGIC)]
    if magic != MAGIC:
        header.fail("magic", f"starts with {magic!r}, a GGUF file starts with {MAGIC!r}; is it another format?")
    header.at = len(MAGIC)
    (version,) = header.numbers("I", "version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in VERSIONS:
            header.fail("version", "the file is big-endian; convert it to little-endian (gguf_convert_endian.py)")
        known = " and ".join(map(str, VERSIONS))
        header.fail("version", f"found {version}; versions {known} are read, convert the model anew")
    tensors, pairs = header.numbers("QQ", "counts")
    left = header.end - header.at
    if tensors * _LEAST_TENSOR_BYTES + pairs * _LEAST_PAIR_BYTES > left:
        header.fail(
            "counts", f"{tensors} tensors and {pairs} metadata pairs do not fit into {left} bytes; it is damaged"
        )
    return tensors, pairs


def _metadata(header: _Header, pairs: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(pairs):
        (key,) = header.texts(f"key of metadata pair {index}")
        where = _named("metadata", key)
        if key in metadata:
            header.fail(where, "occurs twice; the file is damaged or was written wrongly")
        metadata[key] = _value(header, where)
    parts = metadata.get("split.count", 1)
    if parts != 1:
        header.fail("metadata 'split.count'", f"one of {parts} parts; merge them first (llama-gguf-split --merge)")
    return metadata


def _value(header: _Header, where: str) -> Any:
    (kind,) = header.numbers("I", where)
    if kind != _ARRAY:
        return _items(header, where, kind, 1)[0]
    kind, count = header.numbers("IQ", where)
    if kind == _ARRAY:
        header.fail(where, "an array of arrays; arrays of numbers, of bools and of strings are read")
    return _items(header, where, kind, count)


def _items(header: _Header, where: str, kind: int, count: int) -> list[Any]:
    if kind == _STRING:
        return header.texts(where, count)
    if kind not in _NUMBERS:
        known = ", ".join(map(str, sorted([*_NUMBERS, _STRING, _ARRAY])))
        header.fail(where, f"value type {kind} is unknown; known: {known}")
    return list(header.numbers(_NUMBERS[kind], where, count))


def _alignment(header: _Header, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        header.fail("metadata 'general.alignment'", f"found {shown(alignment)}; a power of two from 8 on is needed")
    return alignment


def _table(header: _Header, tensors: int) -> list[_Tensor]:
    table: dict[str, _Tensor] = {}
    for index in range(tensors):
        (name,) = header.texts(f"name of tensor {index}")
        where = _named("tensor", name)
        if name in table:
            header.fail(where, "occurs twice; the file is damaged or was written wrongly")
        table[name] = _row(header, name, where)
    return list(table.values())


def _row(header: _Header, name: str, where: str) -> _Tensor:
    (dimensions,) = header.numbers("I", where)
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        header.fail(where, f"{dimensions} dimensions; from 1 to {MOST_DIMENSIONS} are read")
    shape = header.numbers("Q", where, dimensions)[::-1]  # GGUF states the fastest axis first, torch last
    number, offset = header.numbers("IQ", where)
    if number not in gguf_formats():
        known = ", ".join(f"{known} {fmt.name}" for known, fmt in sorted(gguf_formats().items()))
        header.fail(where, f"type number {number} is not built in; known: {known}")
    fmt = gguf_formats()[number]
    if 0 in shape:
        header.fail(where, f"shape {shape} has no elements")
    if problem := fmt.check(shape):
        header.fail(where, f"shape {shape}: {problem}")
    return _Tensor(name, shape, fmt, offset)


def _weights(header: _Header, table: list[_Tensor], start: int, alignment: int) -> dict[str, Weight]:
    """The weights, which lie one after the other from byte `start` on, each padded to `alignment`, as ggml demands."""
    weights = {}
    expected = 0
    for tensor in table:
        if tensor.offset != expected:
            found = f"data at offset {tensor.offset}, the tensors before it end at {expected}; it is damaged"
            header.fail(_named("tensor", tensor.name), found)
        weights[tensor.name] = _weight(header, tensor, start + expected)
        expected = _padded(expected + tensor.format.nbytes(tensor.shape), alignment)
    return weights


def _weight(header: _Header, tensor: _Tensor, begin: int) -> Weight:
    import torch

    fmt, shape = tensor.format, tensor.shape
    size = fmt.nbytes(shape)
    if size > len(header.data) - begin:
        found = f"{fmt.name} {shape} takes {size} bytes from byte {begin} on, the file has {len(header.data)}"
        header.fail(_named("tensor", tensor.name), f"{found}; it is truncated or damaged, fetch it again")
    stored = torch.frombuffer(header.data, dtype=fmt.dtype, count=size // fmt.dtype.itemsize, offset=begin)
    return Weight(tensor.name, shape, fmt.name, (stored.view(fmt.planes[0].shape(shape)),))


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _named(what: str, name: str) -> str:
    """`what` with its name, cut where a damaged length makes a name of half the file."""
    return f"{what} {shown(name)}"
