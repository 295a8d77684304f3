"""How a tensor's elements are stored: formats with one or more planes, and GGUF's blocks.

Enters: a format's name. Leaves: plane shapes, sizes in bytes, dequantised float32. A format says nothing of where a
tensor lives or who computes with it. Plain formats and kernelmux's own are lower case (`f32`, `q8_32`); GGUF's block
types keep GGUF's spelling (`Q4_K`). Looking one up ignores case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from kernelmux.errors import GraphError, nearest
from kernelmux.graph.dequantize import dequantize_blocks
from kernelmux.graph.groups import dequantize_groups

if TYPE_CHECKING:
    import torch

ALL = 0
"""A plane's `rows` or `cols`: one block spans that whole axis."""


@dataclass(frozen=True)
class Plane:
    """One torch tensor of a stored tensor: for each block of `rows` x `cols` elements, `items` of `dtype`.

    Where it is `column_major`, the items of one column lie together: its last two axes are swapped.
    """

    name: str
    dtype: str
    rows: int = 1
    cols: int = 1
    items: int = 1
    column_major: bool = False

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The plane's own shape for a tensor of `shape`; columns are the last axis, rows the one before."""
        *outer, cols = shape if shape else (1,)
        if self.rows != 1:
            outer = [*outer[:-1], _blocks(outer[-1] if outer else 1, self.rows)]
        across = _blocks(cols, self.cols) * self.items
        if self.column_major and outer:
            return (*outer[:-1], across, outer[-1])
        return (*outer, across)

    def by_rows(self, part: torch.Tensor) -> torch.Tensor:
        """The plane `part` with its rows before its columns, however they are stored: a view."""
        return part.mT if self.column_major and part.dim() > 1 else part

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(self.shape(shape)) * ITEM_BYTES[self.dtype]


def _blocks(extent: int, block: int) -> int:
    return 1 if block == ALL else -(-extent // block)


ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}
ITEM_BYTES |= {"int64": 8, "int32": 4, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class Format:
    """A way to store a tensor; `block` is the number of columns that must go together in one row."""

    name: str
    planes: tuple[Plane, ...]
    block: int = 1
    rounding: float = 0.0
    """NMSE that storing N(0, 1) numbers this way costs at most; of GGUF's types core writes none, so none is stated."""
    gguf: int | None = field(default=None, compare=False)
    """GGUF's number for the type, where it is one of GGUF's."""
    dequantize: Callable[[tuple[torch.Tensor, ...]], torch.Tensor] | None = field(default=None, compare=False)
    """Of 4-bit groups, and of a format that a backend brings: float32 of a weight's planes."""
    draw: Callable[[tuple[int, ...], torch.Generator], tuple[torch.Tensor, ...]] | None = field(
        default=None, compare=False
    )
    """Of a format that a backend brings: valid planes of a random weight of that shape, on the generator's device."""

    @property
    def plain(self) -> bool:
        """True where one element is one item of one plane, so that a torch view of it means what it says."""
        return len(self.planes) == 1 and self.block == 1

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of the first plane."""
        return torch_dtype(self.planes[0].dtype)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of all planes of a tensor of `shape`."""
        return sum(plane.nbytes(shape) for plane in self.planes)

    def check(self, shape: tuple[int, ...]) -> str | None:
        """Why `shape` cannot be stored this way, or None."""
        if self.block > 1 and (not shape or shape[-1] % self.block):
            return (
                f"{self.name} stores rows in blocks of {self.block}, {shape[-1] if shape else 1} columns do not divide"
            )
        return None


def _plain(name: str, dtype: str, gguf: int | None = None, rounding: float = 0.0) -> Format:
    return Format(name, (Plane("data", dtype),), rounding=rounding, gguf=gguf)


def _gguf(name: str) -> Format:
    number, block, size = _GGUF[name]
    return Format(name, (Plane("blocks", "uint8", cols=block, items=size),), block=block, gguf=number)


def _fp8(name: str, scales: Plane, block: int = 1, rounding: float = 2e-3) -> Format:
    return Format(name, (Plane("data", "float8_e4m3fn"), scales), block=block, rounding=rounding)


def int4_name(group: int, scales: str) -> str:
    """What groups of so many columns, or whole rows (ALL), with scales of that dtype are called."""
    return f"int4_{group or 'row'}{'_bf16' if scales == 'bfloat16' else ''}"


def _int4(group: int, scales: str) -> Format:
    planes = (Plane("data", "uint8", cols=2), Plane("scales", scales, cols=group), Plane("zeros", "uint8", cols=group))
    # Whole rows, too, are read 32 columns at a time.
    return Format(int4_name(group, scales), planes, block=group or 32, dequantize=dequantize_groups)


INT4_GROUPS = (32, 64, 128, ALL)
"""Columns that share a scale and a zero point in the formats of 4-bit groups (groups.py)."""
BLOCK_WEIGHTS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
SUPERBLOCK_WEIGHTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# GGUF's number, columns and bytes of each type of block: the gguf package's GGML_QUANT_SIZES (a test compares them),
# which is not imported for them, for it imports numpy.
_GGUF = {
    **{"Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34)},
    **{"Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176)},
    **{"Q6_K": (14, 256, 210), "IQ2_XXS": (16, 256, 66), "IQ2_XS": (17, 256, 74), "IQ3_XXS": (18, 256, 98)},
    **{"IQ1_S": (19, 256, 50), "IQ4_NL": (20, 32, 18), "IQ3_S": (21, 256, 110), "IQ2_S": (22, 256, 82)},
    **{"IQ4_XS": (23, 256, 136), "IQ1_M": (29, 256, 56), "TQ1_0": (34, 256, 54), "TQ2_0": (35, 256, 66)},
    **{"MXFP4": (39, 32, 17), "NVFP4": (40, 64, 36)},
}

FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        _plain("f32", "float32", gguf=0, rounding=2**-48),
        _plain("f16", "float16", gguf=1, rounding=2**-23),
        _plain("bf16", "bfloat16", gguf=30, rounding=2**-17),
        _plain("f64", "float64", gguf=28),
        _plain("i32", "int32", gguf=26),
        # Activations in 8 bits: per 32 columns one scale, and the sum of the 32 dequantised values, which a weight
        # format with a minimum needs (x . (d q + m) = d (x . q) + m sum(x)).
        Format(
            "q8_32",
            (Plane("qs", "int8"), Plane("scales", "float32", cols=32), Plane("sums", "float32", cols=32)),
            block=32,
            rounding=1e-4,
        ),
        _fp8("fp8_tensor", Plane("scales", "float32", rows=ALL, cols=ALL)),
        _fp8("fp8_row", Plane("scales", "float32", cols=ALL)),
        # Column-major, as block-scaled GEMMs (cuBLASLt, DeepGEMM) read scales: those of neighbouring rows together.
        _fp8("fp8_block", Plane("scales", "float32", cols=128, column_major=True), block=128),
        # Of weights, the other side of fp8_block: one scale for 128 rows and 128 columns.
        _fp8("fp8_128x128", Plane("scales", "float32", rows=128, cols=128), block=128, rounding=0.0),
        *(_int4(group, scales) for scales in ("float16", "bfloat16") for group in INT4_GROUPS),
        *map(_gguf, _GGUF),
    )
}
INT4_WEIGHTS = tuple(name for name in FORMATS if name.startswith("int4_"))

CACHE_FORMATS = ("bf16", "f16", "f32", "fp8_row")
"""What the cache of keys and values may be stored as: each head of a position by itself, its scale too."""


def lookup(name: str) -> Format:
    """The format of that name, in any case; GraphError names the nearest spelling."""
    if name in FORMATS:
        return FORMATS[name]
    for format in FORMATS.values():
        if format.name.lower() == name.lower():
            return format
    raise GraphError(f"unknown format {name!r}{nearest(name, FORMATS)}")


@cache
def row_bytes(name: str, columns: int) -> int:
    """Bytes of one row of so many columns."""
    return lookup(name).nbytes((1, columns))


def gguf_formats() -> dict[int, Format]:
    """The formats that GGUF has, by its numbers."""
    return {format.gguf: format for format in FORMATS.values() if format.gguf is not None}


def torch_dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


Dim = int | str
"""An extent, or the name of one that each step sets: `m` token rows, `outs` rows with logits, `seqs`, `seqs+1`."""


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: its name, its shape (extents or symbols) and the name of its format."""

    name: str
    shape: tuple[Dim, ...]
    format: str = "f32"

    @property
    def extents(self) -> tuple[int, ...]:
        """The shape, where every symbol has been resolved; GraphError where one has not."""
        unresolved = [dim for dim in self.shape if isinstance(dim, str)]
        if unresolved:
            raise GraphError(f"{self.name}: {unresolved[0]!r} has no extent yet in {self.shape}")
        return self.shape  # type: ignore[return-value]

    @property
    def nbytes(self) -> int:
        return lookup(self.format).nbytes(self.extents)

    @property
    def convertible(self) -> bool:
        """Whether it may be stored otherwise than a graph states: activations, not ids, and not a cache."""
        return len(self.shape) == 2 and self.format != "i32"

    def resolve(self, dims: Mapping[str, int]) -> Value:
        """The same value with its symbols replaced; an unknown symbol stays."""
        for dim in self.shape:
            if isinstance(dim, str):
                extents = tuple([dims.get(d, d) if isinstance(d, str) else d for d in self.shape])
                return Value(self.name, extents, self.format)
        return self

    def stored(self, format: str) -> Value:
        """The same value in a format."""
        return self if format == self.format else Value(self.name, self.shape, format)


@dataclass(frozen=True, eq=False)
class Weight:
    """A stored tensor of a model: its planes as the file holds them."""

    name: str
    shape: tuple[int, ...]
    format: str
    planes: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        return lookup(self.format).nbytes(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight in float32, or `dtype`; the file's own memory where that is what it holds."""
        import torch

        fmt = lookup(self.format)
        if fmt.dequantize is not None:
            dense = fmt.dequantize(self.planes).view(self.shape)
        elif fmt.plain:
            dense = self.planes[0].view(self.shape)
        elif fmt.gguf is not None:
            blocks = self.planes[0].reshape(-1, fmt.planes[0].items)
            dense = dequantize_blocks(fmt.name, blocks).view(self.shape)
        else:
            dense = dequantize_planes(fmt.name, self.planes).view(self.shape)
        return dense.to(dtype or torch.float32)


def dequantize_planes(name: str, planes: tuple[torch.Tensor, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
    """Float values of a tensor stored in one of kernelmux's own formats, or a plain one; float32 unless told."""
    import torch

    data = planes[0].to(dtype or torch.float32)
    fmt = lookup(name)
    if fmt.plain:
        return data
    scales = fmt.planes[1].by_rows(planes[1]).to(data.dtype)
    return data * _spread(scales, data.shape, fmt.planes[1].rows)


def planes_of_rows(name: str, planes: tuple[torch.Tensor, ...], rows: slice) -> tuple[torch.Tensor, ...]:
    """The planes of some rows of a tensor, as views; `rows` starts at a multiple of the format's block of rows."""
    parts = []
    for part, plane in zip(planes, lookup(name).planes, strict=True):
        if plane.rows != ALL:
            taken = slice(rows.start // plane.rows, -(-rows.stop // plane.rows))
            part = part[..., taken] if plane.column_major else part[taken]
        parts.append(part)
    return tuple(parts)


def empty_planes(value: Value, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Memory for a value, its contents undefined."""
    import torch

    planes = lookup(value.format).planes
    return tuple(torch.empty(p.shape(value.extents), dtype=torch_dtype(p.dtype), device=device) for p in planes)


def side_by_side(values: Sequence[Value], device: str) -> list[torch.Tensor]:
    """Memory for values of one plain format as the columns of one matrix: views whose rows lie apart."""
    import torch

    widths = [value.extents[1] for value in values]
    matrix = torch.empty(values[0].extents[0], sum(widths), dtype=lookup(values[0].format).dtype, device=device)
    return list(torch.split(matrix, widths, dim=1))


def as_tuple(planes: Any) -> tuple[torch.Tensor, ...]:
    """What kernels see of a tensor (a torch tensor, or a tuple where its format has several planes) as a tuple."""
    return planes if isinstance(planes, tuple) else (planes,)


def as_planes(parts: tuple[torch.Tensor, ...]) -> Any:
    """The inverse of `as_tuple`."""
    return parts[0] if len(parts) == 1 else parts


def quantize_planes(name: str, values: torch.Tensor, planes: tuple[torch.Tensor, ...]) -> None:
    """Stores float `values` in `planes`, in a plain format or one of kernelmux's own.

    A block's scale is its largest magnitude over the largest that the element type holds (127, or 448 for e4m3, the
    format of Micikevicius et al. 2022, arXiv:2209.05433); a block of zeros has scale 0.
    """
    import torch

    fmt = lookup(name)
    if fmt.plain:
        planes[0].copy_(values)
        return
    data, scales, *sums = (plane.by_rows(part) for plane, part in zip(fmt.planes, planes, strict=True))
    largest = _largest(fmt)
    scales.copy_(quantized_scales(name, values))
    steps = values / _spread(scales, values.shape, fmt.planes[1].rows).to(values.dtype).clamp(
        min=torch.finfo(torch.float32).tiny
    )
    data.copy_((steps.round() if data.dtype == torch.int8 else steps).clamp(-largest, largest))
    for plane in sums:
        plane.copy_(_blocks_of(dequantize_planes(name, planes), scales.shape).sum(dim=-1))


def stored_as(name: str, values: torch.Tensor) -> torch.Tensor:
    """What is left of float `values` [..., rows, columns] that are stored in a format, as `quantize_planes` has it."""
    import torch

    fmt = lookup(name)
    if fmt.plain:
        return values.to(fmt.dtype).to(values.dtype)
    if values.dim() > 2 and any(plane.rows != 1 for plane in fmt.planes):
        return torch.stack([stored_as(name, each) for each in values])
    planes = empty_planes(Value("", tuple(values.shape), name), str(values.device))
    quantize_planes(name, values, planes)
    return dequantize_planes(name, planes, values.dtype)


def quantized_scales(name: str, values: torch.Tensor) -> torch.Tensor:
    """The scales, by rows, that `quantize_planes` stores `values` with, in their dtype."""
    import torch

    plane = lookup(name).planes[1]
    shape = replace(plane, column_major=False).shape(tuple(values.shape))
    peaks = _blocks_of(values.abs(), shape).amax(dim=-1)
    if shape[:-1] != tuple(values.shape[:-1]):
        tall = plane.rows or len(peaks)
        peaks = torch.stack([peaks[row : row + tall].amax(dim=0) for row in range(0, len(peaks), tall)])
    return peaks / _largest(lookup(name))


def _largest(format: Format) -> float:
    """The largest magnitude that an element of a format with scales holds."""
    import torch

    return 127.0 if format.dtype == torch.int8 else float(torch.finfo(format.dtype).max)


def _blocks_of(values: torch.Tensor, scales_shape: tuple[int, ...]) -> torch.Tensor:
    """[m, n] as [m, blocks, columns of a block]."""
    return values.view(*values.shape[:-1], scales_shape[-1], -1)


def _spread(scales: torch.Tensor, shape: tuple[int, ...], block_rows: int) -> torch.Tensor:
    """Per-block scales, one an element; a single row of scales is left to broadcast."""
    spread = scales.repeat_interleave(shape[-1] // scales.shape[-1], dim=-1)
    return spread.repeat_interleave(block_rows, dim=-2)[: shape[-2]] if block_rows > 1 else spread


ALIGNMENT = 256
"""Bytes: every plane starts at a multiple, so that any kernel may use its widest loads."""


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def human_bytes(count: float) -> str:
    """`1.5 MB`, in powers of ten."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def human_count(count: int, one: str, several: str = "") -> str:
    """`1 row`, `2 rows`."""
    return f"{count} {one if count == 1 else several or f'{one}s'}"


def value_bytes(value: Value) -> int:
    """Bytes of all planes of a value, each aligned."""
    return _aligned_bytes(value.format, value.extents)


@cache
def _aligned_bytes(format: str, extents: tuple[int, ...]) -> int:
    return sum(aligned(plane.nbytes(extents)) for plane in lookup(format).planes)
