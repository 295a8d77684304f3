"""convert on CUDA between the float formats, q8_32, fp8_row, fp8_block and fp8_tensor, each to each.

A program takes some columns of a row: it reads them in one format and writes them in the other, each element once. Two
targets need more: `fp8_tensor`, whose one scale takes a launch before, and `fp8_row` of rows too long for registers,
which are read twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from kernelmux.contract import Declined, Kernel, Launch, Tensors, in_turn
from kernelmux.graph.formats import ALL, lookup
from kernelmux.graph.graph import TensorNode
from kernelmux_triton.launch import bind
from kernelmux_triton.rows import BLOCKS, FLOATS, load_row, planes, reciprocal, scale_of, scaling, store_row

QUANTIZED = (*BLOCKS, "fp8_row", "fp8_tensor")
TILE = 2048
"""Columns that a program takes where no scale of the whole row is wanted."""
LONGEST = 32768
"""Columns of a row that a program keeps in registers; a longer one is read twice."""
PEAKS = 512
"""Programs that look for the largest magnitude of a whole tensor: four a multiprocessor of an H100."""


GROUPED = (*BLOCKS, "fp8_row")
"""What one launch writes."""


class Convert(Kernel):
    """Between two float formats."""

    ops = ("convert",)
    name = "f32"
    precision = 1e-11
    takes: Mapping[str, object] = {"source": FLOATS, "target": FLOATS}

    def refuses(self, node: TensorNode) -> Declined | None:
        wanted = any(value.format.startswith("fp8") for value in (*node.inputs, *node.outputs))
        if wanted and self.device.capability is not None and self.device.capability < (8, 9):
            return Declined(f"Triton has e4m3 from compute capability 8.9 on, not on {self.device.name}", "capability")
        return None

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (x,), (y,) = tensors.inputs, tensors.outputs
        source, target = node.inputs[0].format, node.outputs[0].format
        m, n = node.inputs[0].extents
        group, column_major = scaling(target, n)
        args = (*planes(x)[:2], *planes(y), n, *_read(source, n), group, column_major)
        if group > LONGEST:
            return bind(_convert_long, (m,), *args, TILE, stream=stream, num_warps=8)
        wide = max(group, min(TILE, triton.next_power_of_2(n)))
        return bind(_convert, (m, triton.cdiv(n, wide)), *args, wide, stream=stream, num_warps=_warps(wide))


class Quantize(Convert):
    """From a float format: a scale for each group of columns."""

    name = "quantize"
    takes = {"source": FLOATS, "target": GROUPED}
    input_formats = FLOATS


class Dequantize(Convert):
    """To a float format: each element times its group's scale."""

    name = "dequantize"
    takes = {"source": QUANTIZED, "target": FLOATS}
    output_formats = FLOATS


class Requantize(Convert):
    """From one quantised format to another, in float32 between them."""

    name = "requantize"
    takes = {"source": QUANTIZED, "target": GROUPED}


class RequantizeWhole(Convert):
    """One scale for all: programs leave their largest magnitudes in scratch, then each reads them all and divides."""

    name = "requantize"
    takes = {"source": QUANTIZED, "target": ("fp8_tensor",)}
    launches = 2

    def workspace(self, node: TensorNode) -> int:
        return 4 * PEAKS

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (x,), ((y, scale),) = tensors.inputs, tensors.outputs
        assert tensors.workspace is not None
        peaks = tensors.workspace.view(torch.float32)
        (m, n), source = node.inputs[0].extents, node.inputs[0].format
        wide = min(TILE, triton.next_power_of_2(n))
        tiles = triton.cdiv(n, wide)
        programs = min(PEAKS, m * tiles)
        read = (*planes(x)[:2], peaks, m, programs, n, *_read(source, n))
        look = bind(_peaks, (programs,), *read, wide, stream=stream, num_warps=4)
        divide = bind(_divide, (m, tiles), *read, y, scale, PEAKS, wide, stream=stream, num_warps=4)
        return in_turn(look, divide)


class QuantizeWhole(RequantizeWhole):
    """The same from a float format."""

    name = "quantize"
    takes = {"source": FLOATS, "target": ("fp8_tensor",)}
    input_formats = FLOATS


def _read(format: str, columns: int) -> tuple[int, bool, bool]:
    """The arguments of `load_row` that tell the format: FROM, FROM_COLUMN_MAJOR and WHOLE of the kernels."""
    stored = lookup(format).planes
    return *scaling(format, columns), len(stored) > 1 and stored[1].rows == ALL


def _warps(elements: int) -> int:
    """32 elements a thread, as far as threads go."""
    return min(16, max(1, elements // 1024))


@triton.jit
def _convert(
    x, x_scales, y, scales, sums,
    COLUMNS: tl.constexpr, FROM: tl.constexpr, FROM_COLUMN_MAJOR: tl.constexpr, WHOLE: tl.constexpr,
    GROUP: tl.constexpr, COLUMN_MAJOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x, y [m, COLUMNS]; a program takes WIDE columns of a row."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    first = tl.program_id(1) * WIDE
    values = load_row(x, x_scales, row, rows, first, COLUMNS, FROM, FROM_COLUMN_MAJOR, WHOLE, WIDE)
    store_row(y, scales, sums, row, rows, first, values, COLUMNS, GROUP, COLUMN_MAJOR)


@triton.jit
def _convert_long(
    x, x_scales, y, scales, sums,
    COLUMNS: tl.constexpr, FROM: tl.constexpr, FROM_COLUMN_MAJOR: tl.constexpr, WHOLE: tl.constexpr,
    GROUP: tl.constexpr, COLUMN_MAJOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A row a program, in two passes, to one scale a row."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    peaks = tl.zeros([WIDE], tl.float32)
    for first in range(0, COLUMNS, WIDE):
        values = load_row(x, x_scales, row, rows, first, COLUMNS, FROM, FROM_COLUMN_MAJOR, WHOLE, WIDE)
        peaks = tl.maximum(peaks, tl.abs(values))
    scale = scale_of(tl.max(peaks, axis=0), y)
    tl.store(scales + row, scale)
    share = reciprocal(scale)
    for first in range(0, COLUMNS, WIDE):
        values = load_row(x, x_scales, row, rows, first, COLUMNS, FROM, FROM_COLUMN_MAJOR, WHOLE, WIDE)
        store_row(y, scales, sums, row, rows, first, values * share, COLUMNS, 0, False)


# `rows` and `programs` change with the batch, and are not specialised.
@triton.jit(do_not_specialize=["rows", "programs"])
def _peaks(
    x, x_scales, peaks, rows, programs,
    COLUMNS: tl.constexpr, FROM: tl.constexpr, FROM_COLUMN_MAJOR: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """peaks [programs]: each program's largest magnitude, of every `programs`-th tile of x [rows, COLUMNS]."""
    tiles: tl.constexpr = (COLUMNS + WIDE - 1) // WIDE
    found = tl.zeros([WIDE], tl.float32)
    tile = tl.program_id(0)
    for _ in range(0, tl.cdiv(rows * tiles, programs)):
        # Beyond the end the last tile is looked at again: a row need not be asked whether it is there.
        seen = tl.minimum(tile, rows * tiles - 1)
        row, first = (seen // tiles).to(tl.int64), seen % tiles * WIDE
        values = load_row(x, x_scales, row, rows, first, COLUMNS, FROM, FROM_COLUMN_MAJOR, WHOLE, WIDE)
        found = tl.maximum(found, tl.abs(values))
        tile += programs
    tl.store(peaks + tl.program_id(0), tl.max(found, axis=0))


@triton.jit(do_not_specialize=["rows", "programs"])
def _divide(
    x, x_scales, peaks, rows, programs,
    COLUMNS: tl.constexpr, FROM: tl.constexpr, FROM_COLUMN_MAJOR: tl.constexpr, WHOLE: tl.constexpr,
    y, scale_out,
    PEAKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y [rows, COLUMNS] and its one scale; a program takes WIDE columns of a row."""
    # From the end, where the first pass stopped: what it read last is still in the cache.
    row = (rows - 1 - tl.program_id(0)).to(tl.int64)
    first = tl.program_id(1) * WIDE
    values = load_row(x, x_scales, row, rows, first, COLUMNS, FROM, FROM_COLUMN_MAJOR, WHOLE, WIDE)
    of = tl.arange(0, PEAKS)
    scale = scale_of(tl.max(tl.load(peaks + of, mask=of < programs, other=0.0), axis=0), y)
    store_row(y, scale_out, scale_out, row, rows, first, values * reciprocal(scale), COLUMNS, 0, False)
    if tl.program_id(0) == 0 and tl.program_id(1) == 0:
        tl.store(scale_out, scale)
