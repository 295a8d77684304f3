"""Reads safetensors files, of which a model has one or several: where in them each tensor lies; and writes one.

Enters: paths. Leaves: weights by name, which are read when they are packed; ModelError at the first fault. Every offset
is checked against the size of the file, and tensors may neither overlap nor leave gaps.
Layout: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from kernelmux.errors import shown
from kernelmux.graph.formats import ITEM_BYTES
from kernelmux.models.stored import StoredFile, StoredPlane, StoredWeight

if TYPE_CHECKING:
    import torch

DTYPES: Mapping[str, str] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
"""Of a model's weights, and their formats."""
ITEMS: Mapping[str, str] = {
    **{"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"},
    **{"I64": "int64", "I32": "int32", "I8": "int8", "U8": "uint8"},
}
"""What the planes of all formats are stored as, and torch's names for it."""
LONGEST_HEADER = 1 << 26
"""Bytes; a header has some hundred for each tensor."""
MOST_DIMENSIONS = 4
_LENGTH = 8


def plain_weight(name: str, plane: StoredPlane) -> StoredWeight:
    """A tensor of one of DTYPES as a weight."""
    formats = {ITEMS[dtype]: format for dtype, format in DTYPES.items()}
    return StoredWeight(name, plane.shape, formats[plane.dtype], (plane,))


def read_planes(
    path: Path, dtypes: tuple[str, ...] = tuple(ITEMS), least: int = 1
) -> tuple[dict[str, StoredPlane], tuple[int, int]]:
    """The tensors of one file, each of one of these types and of `least` dimensions or more, and its stamp."""
    file = StoredFile(path)
    if file.size < _LENGTH:
        raise file.fault(f"{file.size} bytes are no safetensors file; it is truncated, fetch it again")
    length = int.from_bytes(file.read(0, _LENGTH), "little")
    if length > file.size - _LENGTH:
        raise file.fault(f"a header of {length} bytes in a file of {file.size}; it is truncated or no safetensors file")
    if length > LONGEST_HEADER:
        raise file.fault(f"a header of {length} bytes; up to {LONGEST_HEADER} are read")
    table = json_object(file, file.read(_LENGTH, length))
    table.pop("__metadata__", None)
    start = _LENGTH + length
    planes = {name: _stored(file, name, row, start, dtypes, least) for name, row in table.items()}
    _check_extents(file, planes, start)
    return planes, file.stamp


def write_safetensors(tensors: Mapping[str, torch.Tensor], file: BinaryIO) -> None:
    """Writes tensors by name, one after another, as `read_planes` reads them."""
    write_header({name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()}, file)
    for tensor in tensors.values():
        write_tensor(tensor, file)


def write_header(table: Mapping[str, tuple[str, tuple[int, ...]]], file: BinaryIO) -> None:
    """Writes what stands before tensors, whose dtypes (torch's names) and shapes `table` has in their order."""
    names = {name: dtype for dtype, name in ITEMS.items()}
    # What wrote it: transformers' older versions read no file that does not say.
    rows: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in table.items():
        start, end = end, end + ITEM_BYTES[dtype] * math.prod(shape)
        rows[name] = {"dtype": names[dtype], "shape": [*shape], "data_offsets": [start, end]}
    header = json.dumps(rows).encode()
    file.write(len(header).to_bytes(_LENGTH, "little") + header)


def write_tensor(tensor: torch.Tensor, file: BinaryIO) -> None:
    """Writes the next tensor's bytes."""
    import torch

    file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def json_object(file: StoredFile, data: bytes | bytearray) -> dict[str, Any]:
    """A JSON object, each key of which stands once; ModelError where the bytes are none."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key occurs twice")
        return found

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number")

    try:
        found = json.loads(data, object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise file.fault(f"is not JSON: {shown(str(error))}") from error
    if not isinstance(found, dict):
        raise file.fault(f"is JSON, but of a {type(found).__name__}; an object is needed")
    return found


def _stored(file: StoredFile, name: str, row: Any, start: int, dtypes: tuple[str, ...], least: int) -> StoredPlane:
    """Where a tensor lies, by its row of the header; the file's data begins at byte `start`."""
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        raise file.fault(f"tensor {shown(name)}: dtype, shape and data_offsets are needed, found {shown(row)}")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        others = isinstance(dtype, str) and dtype in ITEMS
        more = ", and others by config.json's quantization_config" if others else ""
        raise file.fault(f"tensor {shown(name)} is stored as {shown(dtype)}; {', '.join(dtypes)} are read{more}")
    if not _are_counts(shape) or not least <= len(shape) <= MOST_DIMENSIONS or 0 in shape:
        read = f"{least} to {MOST_DIMENSIONS} positive counts are read"
        raise file.fault(f"tensor {shown(name)}: shape {shown(shape)}; {read}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise file.fault(f"tensor {shown(name)}: data_offsets {shown(offsets)}; a first and a last byte are needed")
    size = ITEM_BYTES[ITEMS[dtype]] * math.prod(shape)
    first, last = offsets
    if last - first != size or start + last > file.size:
        found = f"{dtype} {shown(shape)} takes {size} bytes, bytes {first} to {last} of {file.size - start} are stated"
        raise file.fault(f"tensor {shown(name)}: {found}; it is truncated or damaged, fetch it again")
    return StoredPlane(file, start + first, ITEMS[dtype], tuple(shape), size)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**62 for value in values)


def _check_extents(file: StoredFile, planes: Mapping[str, StoredPlane], start: int) -> None:
    """ModelError unless tensors lie one after another up to the end of the file."""
    end = start
    for name, plane in sorted(planes.items(), key=lambda each: each[1].offset):
        if plane.offset != end:
            raise file.fault(f"tensor {shown(name)} begins at byte {plane.offset}, not at {end}; it is damaged")
        end += plane.nbytes
    if end != file.size:
        raise file.fault(f"its tensors end at byte {end}, the file has {file.size}; it is damaged")
