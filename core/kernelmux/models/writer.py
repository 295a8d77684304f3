"""Writes a GGUF file in order, tensor after tensor: metadata and the table first, for sizes are known before bytes.

Enters: metadata with GGUF's types, tensors as name, shape and format, then their bytes. Leaves: a file for `read`.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from kernelmux.files import MAGIC
from kernelmux.graph.formats import Value, lookup
from kernelmux.models.header import ARRAY, NUMBERS, STRING, Kind

VERSION = 3
ALIGNMENT = 32
"""Where the metadata states none."""
_FLOAT, _BOOL, _UINT32, _INT32, _UINT64, _INT64 = 6, 7, 4, 5, 10, 11


class Writer:
    """A file that is being written: the header at once, then each tensor's bytes by `tensor`, in the table's order."""

    def __init__(
        self, file: BinaryIO, metadata: Mapping[str, Any], kinds: Mapping[str, Kind], tensors: Sequence[Value]
    ) -> None:
        """`kinds` are GGUF's types of values; of a key that has none there the type follows from its value."""
        self._file = file
        self._alignment = metadata.get("general.alignment", ALIGNMENT)
        header = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata))
        header += b"".join(_pair(key, value, kinds.get(key) or kind_of(value)) for key, value in metadata.items())
        header += b"".join(self._rows(tensors))
        file.write(header)
        self._pad(len(header))

    def tensor(self, pieces: Iterator[memoryview]) -> int:
        """The bytes of the next tensor, in pieces; says how many there were."""
        size = 0
        for piece in pieces:
            size += self._file.write(piece)
        self._pad(size)
        return size

    def _rows(self, tensors: Sequence[Value]) -> Iterator[bytes]:
        offset = 0
        for tensor in tensors:
            shape, format = tensor.extents[::-1], lookup(tensor.format)
            numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, format.gguf, offset)
            yield _text(tensor.name) + numbers
            offset += -(-tensor.nbytes // self._alignment) * self._alignment

    def _pad(self, size: int) -> None:
        self._file.write(bytes(-size % self._alignment))


def kind_of(value: Any) -> Kind:
    """The type that a value of plain Python is written as, where no file says: the first that holds it.

    Counts are uint32 and lists of integers int32 if they can be, as GGUF's keys are.
    """
    if isinstance(value, list):
        if not value or not all(type(item) is int for item in value):
            return (ARRAY, kind_of(value[0])[0] if value else _INT32)
        least, most = min(value), max(value)
        if least >= -(2**31) and most < 2**31:
            return (ARRAY, _INT32)
        return (ARRAY, _INT64 if most < 2**63 else _UINT64)
    if isinstance(value, str):
        return (STRING,)
    if isinstance(value, bool | float):
        return (_BOOL if isinstance(value, bool) else _FLOAT,)
    if value < 0:
        return (_INT32 if value >= -(2**31) else _INT64,)
    return (_UINT32 if value < 2**32 else _UINT64,)


def _pair(key: str, value: Any, kind: Kind) -> bytes:
    start = _text(key) + struct.pack("<I", kind[0])
    if kind[0] != ARRAY:
        return start + _items([value], kind[0])
    return start + struct.pack("<IQ", kind[1], len(value)) + _items(value, kind[1])


def _items(values: Sequence[Any], kind: int) -> bytes:
    if kind == STRING:
        return b"".join(map(_text, values))
    return struct.pack(f"<{len(values)}{NUMBERS[kind]}", *values)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
