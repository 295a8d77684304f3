"""convert on CUDA between float and quantised formats: one Triton kernel each, each element read and written once.

A quantised tensor is seen as groups of elements that share a scale: whole rows (`fp8_row`), or parts of rows that lie
one after the other whatever row they are in (`fp8_block`, `q8_32`). Only `fp8_tensor` takes two launches.

Scales lie in the order of their groups; in a column-major plane (`fp8_block`) those of the same columns lie together.
`ACROSS` is how many groups a row has there, and else 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from kernelmux.formats import ALL, lookup
from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Kernel, Launch, Tensors
from kernelmux_triton.launch import bind
from kernelmux_triton.rows import FLOATS, TINY

TILE = 4096
"""Elements that a program takes where groups are small."""
LONGEST = 32768
"""Columns of a group that a program keeps in registers; a longer one is read twice."""
PEAKS = 512
"""Programs that look for the largest magnitude of a whole tensor: four a multiprocessor of an H100."""

# `count` and `programs` change with the rows, and are not specialised; of `_peaks` and `_divide`, whose loads stop at
# `count`, Triton must know that sixteens fit in it.

# Half an int8 step beyond this constant has no bits left, so that adding it rounds to nearest, ties to even.
ROUND = tl.constexpr(1.5 * 2**23)


def offer(source: str, target: str) -> Kernel:
    """The kernel between a float format and a quantised one."""
    if source not in FLOATS:
        return Dequantize()
    return QuantizeWhole() if _whole(target) else Quantize()


class Quantize(Kernel):
    """A scale for each group of columns."""

    name = "quantize"
    precision = 1e-11

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (x,), (planes,) = tensors.inputs, tensors.outputs
        data, scales = planes[:2]
        format = node.outputs[0].format
        count, columns = _groups(format, x.shape)
        # A plane of sums that the format lacks is never touched.
        args = (x, data, scales, planes[-1], count, columns, len(planes) > 2, _largest(format))
        if columns > LONGEST:
            return bind(_quantize_long, (count,), *args, TILE, num_warps=8)
        wide = triton.next_power_of_2(columns)
        tall = max(1, TILE // wide)
        args = (*args, _across(format, x.shape), tall, wide)
        return bind(_quantize, (triton.cdiv(count, tall),), *args, num_warps=_warps(tall * wide))


class QuantizeWhole(Kernel):
    """One scale for all: programs leave their largest magnitudes in scratch, then each reads them all and divides."""

    name = "quantize"
    precision = 1e-11
    launches = 2

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS]

    def workspace(self, node: TensorNode) -> int:
        return 4 * PEAKS

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (x,), ((data, scale),) = tensors.inputs, tensors.outputs
        assert tensors.workspace is not None
        peaks = tensors.workspace.view(scale.dtype)
        chunks = triton.cdiv(x.numel(), TILE)
        programs = min(PEAKS, chunks)
        look = bind(_peaks, (programs,), x, peaks, x.numel(), programs, TILE, num_warps=4)
        largest = _largest(node.outputs[0].format)
        args = (x, peaks, data, scale, x.numel(), programs, largest, PEAKS, TILE)
        divide = bind(_divide, (chunks,), *args, num_warps=4)

        def launch() -> None:
            look()
            divide()

        return launch


class Dequantize(Kernel):
    """Each element times its group's scale."""

    name = "dequantize"
    precision = 1e-11

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (planes,), (y,), format = tensors.inputs, tensors.outputs, node.inputs[0].format
        count, columns = _groups(format, y.shape)
        wide = min(TILE, triton.next_power_of_2(columns))
        tall = TILE // wide
        grid = (triton.cdiv(count, tall), triton.cdiv(columns, wide))
        across = _across(format, y.shape)
        args = (*planes[:2], y, count, columns, 0 if _whole(format) else 1, across, tall, wide)
        return bind(_dequantize, grid, *args, num_warps=4)


def _groups(format: str, shape: Sequence[int]) -> tuple[int, int]:
    """How many groups a tensor [m, k] has, and their columns; with one scale for all, its rows."""
    columns = lookup(format).planes[1].cols
    return (shape[0], shape[1]) if columns == ALL else (shape[0] * shape[1] // columns, columns)


def _across(format: str, shape: Sequence[int]) -> int:
    """The groups of a row where scales are column-major, else 1."""
    plane = lookup(format).planes[1]
    return shape[1] // plane.cols if plane.column_major else 1


def _whole(format: str) -> bool:
    return lookup(format).planes[1].rows == ALL


def _largest(format: str) -> float:
    """The largest magnitude of the format's elements."""
    return 127.0 if lookup(format).planes[0].dtype == "int8" else 448.0


def _warps(elements: int) -> int:
    """32 elements a thread, as far as threads go."""
    return min(16, max(1, elements // 1024))


@triton.jit
def _place(group, count, ACROSS: tl.constexpr):
    """Where the scale of a group lies: with `ACROSS` at 1, in the groups' own order."""
    return group % ACROSS * (count // ACROSS) + group // ACROSS


@triton.jit(do_not_specialize=["count"])
def _quantize(
    x,
    data,
    scales,
    sums,
    count,
    COLUMNS: tl.constexpr,
    SUMS: tl.constexpr,
    LARGEST: tl.constexpr,
    ACROSS: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * TALL
    row, column = tl.arange(0, TALL), tl.arange(0, WIDE)
    there = row < count - first
    inside = there[:, None] & (column < COLUMNS)[None, :]
    at = row[:, None] * COLUMNS + column[None, :]
    values = tl.load(x + first * COLUMNS + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(values), axis=1), LARGEST)
    steps = values * tl.div_rn(1.0, tl.maximum(scale, TINY))[:, None]
    if SUMS:
        steps = (steps + ROUND) - ROUND
        tl.store(sums + first + row, tl.sum(steps, axis=1) * scale, mask=there)
    tl.store(data + first * COLUMNS + at, steps.to(data.dtype.element_ty), mask=inside)
    tl.store(scales + _place(first + row, count, ACROSS), scale, mask=there)


@triton.jit(do_not_specialize=["count"])
def _quantize_long(
    x,
    data,
    scales,
    sums,
    count,
    COLUMNS: tl.constexpr,
    SUMS: tl.constexpr,
    LARGEST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A row a program, in two passes; no format of so long groups keeps sums."""
    group = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDE)
    peaks = tl.zeros([WIDE], tl.float32)
    for start in range(0, COLUMNS, WIDE):
        values = tl.load(x + group * COLUMNS + start + column, mask=start + column < COLUMNS, other=0.0)
        peaks = tl.maximum(peaks, tl.abs(values.to(tl.float32)))
    scale = tl.div_rn(tl.max(peaks, axis=0), LARGEST)
    share = tl.div_rn(1.0, tl.maximum(scale, TINY))
    for start in range(0, COLUMNS, WIDE):
        inside = start + column < COLUMNS
        values = tl.load(x + group * COLUMNS + start + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(data + group * COLUMNS + start + column, (values * share).to(data.dtype.element_ty), mask=inside)
    tl.store(scales + group, scale)


@triton.jit(do_not_specialize=["programs"])
def _peaks(x, peaks, count, programs, WIDE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    found = tl.zeros([WIDE], tl.float32)
    for _ in range(0, tl.cdiv(count, programs * WIDE)):
        values = tl.load(x + at, mask=at < count, other=0.0)
        found = tl.maximum(found, tl.abs(values.to(tl.float32)))
        at += programs * WIDE
    tl.store(peaks + tl.program_id(0), tl.max(found, axis=0))


@triton.jit(do_not_specialize=["programs"])
def _divide(
    x,
    peaks,
    data,
    scale_out,
    count,
    programs,
    LARGEST: tl.constexpr,
    PEAKS: tl.constexpr,
    WIDE: tl.constexpr,
):
    # From the end, where the first pass stopped: what it read last is still in the cache.
    at = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    values = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    of = tl.arange(0, PEAKS)
    scale = tl.div_rn(tl.max(tl.load(peaks + of, mask=of < programs, other=0.0), axis=0), LARGEST)
    share = tl.div_rn(1.0, tl.maximum(scale, TINY))
    tl.store(data + at, (values * share).to(data.dtype.element_ty), mask=at < count)
    if tl.program_id(0) == 0:
        tl.store(scale_out, scale)


@triton.jit(do_not_specialize=["count"])
def _dequantize(
    data,
    scales,
    y,
    count,
    COLUMNS: tl.constexpr,
    EACH: tl.constexpr,
    ACROSS: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """`EACH` is 1 where every group has a scale, 0 where all share the first."""
    first = tl.program_id(0).to(tl.int64) * TALL
    row, column = tl.arange(0, TALL), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    there = row < count - first
    inside = there[:, None] & (column < COLUMNS)[None, :]
    at = row[:, None] * COLUMNS + column[None, :]
    values = tl.load(data + first * COLUMNS + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scales + _place(first + row, count, ACROSS) * EACH, mask=there, other=0.0)
    tl.store(y + first * COLUMNS + at, (values * scale[:, None]).to(y.dtype.element_ty), mask=inside)
