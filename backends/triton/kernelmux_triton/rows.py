"""Rows as Triton kernels read and write them, in every format of activations: the one place that knows how these lie.

A format is told to a kernel as `GROUP`, the columns that share a scale (0: no scales), and `COLUMN_MAJOR`, whether the
scales of neighbouring rows lie together. Values pass through registers as float32 [WIDE], zeros beyond the row's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from kernelmux.graph.formats import Value, as_tuple, lookup

FLOATS = ("f32", "bf16", "f16")
BLOCKS = ("q8_32", "fp8_block")
"""Formats whose scales are those of a few columns."""

TINY = tl.constexpr(2.0**-126)
"""What a scale is at least when values are divided by it: those of a block of zeros are zeros."""
ROUND = tl.constexpr(1.5 * 2**23)
"""Half an int8 step beyond this constant has no bits left: adding it rounds to nearest, ties to even."""


def emitted(value: Value, longest: int | None = None) -> Sequence[str]:
    """The formats in which `store_row` can write a value: those whose blocks fit its columns.

    `fp8_row` only up to `longest` columns, where a kernel must hold a whole row for it.
    """
    columns = value.shape[-1]
    if not isinstance(columns, int):
        return FLOATS
    blocks = [format for format in BLOCKS if lookup(format).check((columns,)) is None]
    return (*FLOATS, *(["fp8_row"] if longest is None or columns <= longest else []), *blocks)


def scaling(format: str, columns: int) -> tuple[int, bool]:
    """`GROUP` and `COLUMN_MAJOR` of rows of so many columns; a scale for a whole row is one for a power of two."""
    planes = lookup(format).planes
    if len(planes) == 1:
        return 0, False
    return planes[1].cols or triton.next_power_of_2(columns), planes[1].column_major


def planes(stored: Any) -> tuple[Any, Any, Any]:
    """The tensors data, scales and sums of a value; one that the format lacks is never touched, and stands for it."""
    data, *scales = as_tuple(stored)
    return data, scales[0] if scales else data, scales[-1] if scales else data


def warps(elements: int) -> int:
    """16 elements a thread: the one row of a decode step is read with few loads one after another."""
    return min(16, max(1, elements // 512))


@triton.jit
def reciprocal(scale):
    """What values are multiplied by instead of divided by their scale."""
    return tl.div_rn(1.0, tl.maximum(scale, TINY))


@triton.jit
def scale_of(peak, y):
    """The scale of values whose largest magnitude is `peak`, as y stores them: int8 up to 127, e4m3 up to 448."""
    largest: tl.constexpr = 127.0 if y.dtype.element_ty == tl.int8 else 448.0
    return tl.div_rn(peak, largest)


@triton.jit
def place(row, rows, group, NUMBER: tl.constexpr, COLUMN_MAJOR: tl.constexpr):
    """Where the scale of a row's group lies, of `NUMBER` groups a row and `rows` rows."""
    return group * rows + row if COLUMN_MAJOR else row * NUMBER + group


@triton.jit
def load_row(
    x, scales, row, rows, first,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, COLUMN_MAJOR: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Columns `first` to `first + WIDE` of a row, as float32; `WHOLE` where one scale is all of the tensor's."""
    column = first + tl.arange(0, WIDE)
    values = tl.load(x + row * COLUMNS + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    if GROUP > 0:
        if WHOLE:
            values *= tl.load(scales)
        elif GROUP >= COLUMNS:
            values *= tl.load(scales + row)
        else:
            number: tl.constexpr = COLUMNS // GROUP
            group = first // GROUP + tl.arange(0, WIDE // GROUP)
            scale = tl.load(scales + place(row, rows, group, number, COLUMN_MAJOR), mask=group < number, other=0.0)
            values = tl.reshape(tl.reshape(values, [WIDE // GROUP, GROUP]) * scale[:, None], [WIDE])
    return values


@triton.jit
def store_row(
    y, scales, sums, row, rows, first, values,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, COLUMN_MAJOR: tl.constexpr,
):  # fmt: skip
    """Writes `values`, float32 [WIDE] and zeros beyond the row, as columns from `first` on, with their groups' scales.

    WIDE is a multiple of GROUP. Where y is int8, the sums of what the groups' numbers stand for are written too.
    """
    wide: tl.constexpr = values.shape[0]
    if GROUP > 0:
        number: tl.constexpr = (COLUMNS + GROUP - 1) // GROUP
        group = first // GROUP + tl.arange(0, wide // GROUP)
        at = place(row, rows, group, number, COLUMN_MAJOR)
        grouped = tl.reshape(values, [wide // GROUP, GROUP])
        scale = scale_of(tl.max(tl.abs(grouped), axis=1), y)
        grouped = grouped * reciprocal(scale)[:, None]
        if y.dtype.element_ty == tl.int8:
            grouped = (grouped + ROUND) - ROUND
            tl.store(sums + at, tl.sum(grouped, axis=1) * scale, mask=group < number)
        tl.store(scales + at, scale, mask=group < number)
        values = tl.reshape(grouped, [wide])
    column = first + tl.arange(0, wide)
    tl.store(y + row * COLUMNS + column, values.to(y.dtype.element_ty), mask=column < COLUMNS)
