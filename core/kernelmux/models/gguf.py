"""Reads a GGUF file: metadata as plain Python values, and where in the file each weight lies.

Enters: a path. Leaves: a ModelFile, whose weights are read when they are packed. Every count, length and extent is
checked against the size of the file before it is used; the gguf package's own reader trusts the header, and takes
seconds for a vocabulary. What a model needs (keys, tensors, a tokenizer) is not judged here.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kernelmux.errors import ModelError, shown
from kernelmux.files import MAGIC
from kernelmux.graph.formats import Format, Weight, gguf_formats
from kernelmux.models.experts import experts_stacked
from kernelmux.models.header import LONGEST_KEY, LONGEST_NAME, MOST_PAIRS, MOST_TENSORS, Header, Kind
from kernelmux.models.names import gguf_expert_name
from kernelmux.models.stored import StoredFile, StoredPlane, StoredWeight

VERSIONS = (2, 3)
MOST_DIMENSIONS = 4
MOST_PARTS = 1000
_SPLIT = "split."

# The shortest entry: an empty name, then a type and one byte of value; or a type, no dimension and an offset.
_LEAST_PAIR_BYTES = 8 + 4 + 1
_LEAST_TENSOR_BYTES = 8 + 4 + 4 + 8


@dataclass(frozen=True, eq=False)
class ModelFile:
    """A model as its file states it: metadata by key, weights by tensor name, in the file's order."""

    path: Path
    metadata: Mapping[str, Any]
    weights: Mapping[str, Weight]
    stamp: tuple[int, ...] | None = None
    """Of each file the size, and when it was last changed, in nanoseconds; None where there is no file."""
    pairing: Literal["adjacent", "halves"] | None = None
    """Which elements of a head turn together, where that is not what GGUF stores of the architecture."""
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    """GGUF's types of the metadata's values."""
    notes: tuple[str, ...] = ()
    """What the file states that is not used, though the model is the same without it."""
    held: tuple[str, ...] = ()
    """Which weights are held otherwise than they are stored, and what they take: told whenever the file is opened."""

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
    """The model in a GGUF file (version 2 or 3, little-endian); ModelError at the first fault.

    Of a file that `llama-gguf-split` made any part is as good as another: all are opened, by their names. Experts that
    an older file has one tensor each are one weight of all.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise ModelError(f"{path}: is a directory, not a GGUF file; name the .gguf file in it", file=str(path))
    asked = _read_part(path)
    if asked.count <= 1:
        weights = experts_stacked(path, asked.weights, gguf_expert_name)
        return ModelFile(path, asked.metadata, weights, asked.file.stamp, kinds=asked.kinds)
    paths = _part_paths(asked)
    parts = [asked if number == asked.number else _read_part(path) for number, path in enumerate(paths)]
    metadata, weights = dict(parts[0].metadata), dict[str, StoredWeight]()
    for number, part in enumerate(parts):
        _check_part(part, number, parts[0])
        for name, weight in part.weights.items():
            if name in weights:
                raise part.file.fault(f"{_named('tensor', name)}: is in an earlier part too; the parts are mixed")
            weights[name] = weight
    if len(weights) != (total := metadata.get(f"{_SPLIT}tensors.count", len(weights))):
        raise asked.file.fault(f"its {asked.count} parts have {len(weights)} tensors of {total}; the parts are mixed")
    stamp = tuple(each for part in parts for each in part.file.stamp)
    metadata = {key: value for key, value in metadata.items() if not key.startswith(_SPLIT)}
    weights = experts_stacked(path, weights, gguf_expert_name)
    return ModelFile(path, metadata, weights, stamp, kinds=parts[0].kinds)


@dataclass(frozen=True, eq=False)
class _Part:
    """One file, which may be one of several parts of a model."""

    file: StoredFile
    metadata: Mapping[str, Any]
    kinds: Mapping[str, Kind]
    weights: Mapping[str, StoredWeight]
    count: int
    number: int
    """From 0 on."""


def _read_part(path: Path) -> _Part:
    header = Header(StoredFile(path))
    tensors, pairs = _opening(header)
    metadata, kinds = _metadata(header, pairs)
    alignment = _alignment(header, metadata)
    table = _table(header, tensors)
    weights = _weights(header, table, _padded(header.at, alignment), alignment)
    count, number = (_split_number(header, metadata, key, default) for key, default in (("count", 1), ("no", 0)))
    return _Part(header.file, metadata, kinds, weights, count, number)


def _split_number(header: Header, metadata: Mapping[str, Any], key: str, default: int) -> int:
    value = metadata.get(f"{_SPLIT}{key}", default)
    if type(value) is not int or not 0 <= value <= MOST_PARTS:
        header.fail(f"metadata '{_SPLIT}{key}'", f"found {shown(value)}; a number up to {MOST_PARTS} is needed")
    return value


def _part_paths(part: _Part) -> list[Path]:
    """Where all parts of a model lie, by the name of one: `NAME-00001-of-00003.gguf`, as `llama-gguf-split` names them.

    ModelError where that is not named so, or one is missing.
    """
    path, end = part.file.path, f"-{part.number + 1:05d}-of-{part.count:05d}.gguf"
    if part.number >= part.count or not path.name.endswith(end):
        raise part.file.fault(f"is part {part.number + 1} of {part.count}: name it NAME{end}, and the others likewise")
    start = path.name.removesuffix(end)
    paths = [path.with_name(f"{start}-{number:05d}-of-{part.count:05d}.gguf") for number in range(1, part.count + 1)]
    if missing := [each.name for each in paths if not os.path.lexists(each)]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise part.file.fault(f"is one of {part.count} parts, {missing[0]}{more} is missing beside it; fetch it")
    return paths


def _check_part(part: _Part, number: int, first: _Part) -> None:
    """ModelError where a file is not this part of the model that the first part begins."""
    if (part.count, part.number) != (first.count, number):
        found = (
            f"says that it is part {part.number + 1} of {part.count}; by its name it is {number + 1} of {first.count}"
        )
        raise part.file.fault(found)
    for key, value in part.metadata.items():
        if key != f"{_SPLIT}no" and key != "general.alignment" and value != first.metadata.get(key):
            ours = shown(first.metadata.get(key))
            raise part.file.fault(
                f"{_named('metadata', key)}: {shown(value)}, the first part has {ours}; they are mixed"
            )


def _opening(header: Header) -> tuple[int, int]:
    """How many tensors and how many metadata pairs the file states."""
    magic = bytes(header.file.read(0, min(len(MAGIC), header.file.size)))
    if magic != MAGIC:
        path = header.file.path
        of_folder = path.name == "config.json" or path.suffix == ".safetensors"
        other = f"it is of a model's folder: name {path.parent}" if of_folder else "is it another format?"
        header.fail("magic", f"starts with {magic!r}, a GGUF file starts with {MAGIC!r}; {other}")
    header.at = len(MAGIC)
    (version,) = header.numbers("I", "version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in VERSIONS:
            header.fail("version", "the file is big-endian; convert it to little-endian (gguf_convert_endian.py)")
        known = " and ".join(map(str, VERSIONS))
        header.fail("version", f"found {version}; versions {known} are read, convert the model anew")
    tensors, pairs = header.numbers("QQ", "counts")
    found = f"{tensors} tensors and {pairs} metadata pairs"
    if tensors * _LEAST_TENSOR_BYTES + pairs * _LEAST_PAIR_BYTES > header.left:
        header.fail("counts", f"{found} do not fit into {header.left} bytes; it is damaged")
    if tensors > MOST_TENSORS or pairs > MOST_PAIRS:
        header.fail("counts", f"{found}; up to {MOST_TENSORS} and {MOST_PAIRS} are read")
    return tensors, pairs


def _metadata(header: Header, pairs: int) -> tuple[dict[str, Any], dict[str, Kind]]:
    """The values by key, and their types."""
    metadata: dict[str, Any] = {}
    kinds: dict[str, Kind] = {}
    for index in range(pairs):
        key = header.text(f"key of metadata pair {index}", LONGEST_KEY)
        where = _named("metadata", key)
        if key in metadata:
            header.fail(where, "occurs twice; the file is damaged or was written wrongly")
        metadata[key], kinds[key] = header.value(where)
    return metadata, kinds


def _alignment(header: Header, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        header.fail("metadata 'general.alignment'", f"found {shown(alignment)}; a power of two from 8 on is needed")
    return alignment


def _table(header: Header, tensors: int) -> list[_Tensor]:
    table: dict[str, _Tensor] = {}
    for index in range(tensors):
        name = header.text(f"name of tensor {index}", LONGEST_NAME)
        where = _named("tensor", name)
        if name in table:
            header.fail(where, "occurs twice; the file is damaged or was written wrongly")
        table[name] = _row(header, name, where)
    return list(table.values())


def _row(header: Header, name: str, where: str) -> _Tensor:
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


def _weights(header: Header, table: list[_Tensor], start: int, alignment: int) -> dict[str, StoredWeight]:
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


def _weight(header: Header, tensor: _Tensor, begin: int) -> StoredWeight:
    fmt, shape = tensor.format, tensor.shape
    size = fmt.nbytes(shape)
    if size > header.file.size - begin:
        found = f"{fmt.name} {shape} takes {size} bytes from byte {begin} on, the file has {header.file.size}"
        header.fail(_named("tensor", tensor.name), f"{found}; it is truncated or damaged, fetch it again")
    (plane,) = fmt.planes
    stored = StoredPlane(header.file, begin, plane.dtype, plane.shape(shape), size)
    return StoredWeight(tensor.name, shape, fmt.name, (stored,))


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _named(what: str, name: str) -> str:
    """`what` with its name, cut where a damaged length makes a name of half the file."""
    return f"{what} {shown(name)}"
