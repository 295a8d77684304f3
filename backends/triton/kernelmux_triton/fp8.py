"""mul_mat and what is fused with it of e4m3 weights and activations, by how they are scaled, for any number of rows.

Up to 64 rows the weights are read once, as in few_rows.py; more rows are tiles of the tensor cores. Weights in any
format are quantised once; one that is stored in the same scheme is used as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from kernelmux.contract import Declined, Efficiency, Launch, Tensors
from kernelmux.contract.fast_sums import too_long
from kernelmux.graph.graph import TensorNode
from kernelmux_triton import few_rows, fp8_kernels
from kernelmux_triton.few_rows import MOST, FewRows, Operands
from kernelmux_triton.few_rows_tilings import Tiling as FewRowsTiling
from kernelmux_triton.few_rows_tilings import Weights
from kernelmux_triton.launch import bind
from kernelmux_triton.rows import FLOATS

DEEP = 128
"""Columns of x and W in a tile: a row of 128 bytes, as shared memory likes them."""
GROUP = 8
"""Rows of tiles that are gone through together."""


@dataclass(frozen=True)
class Gemm:
    """Rows and columns of a tile of y, tiles of x and W under way, warps, and how programs go through tiles.

    `pieces`: parts in which a tile is stored. `flat`: the next tile's loads start before this one is stored. `double`:
    two tiles of columns a step, one multiplied while the sums of the other are added. `programs`: for a multiprocessor.
    """

    tall: int
    wide: int
    stages: int
    warps: int
    pieces: int = 1
    flat: bool = False
    double: bool = False
    programs: int = 1

    def __str__(self) -> str:
        how = f"{' flat' if self.flat else ''}{' double' if self.double else ''}"
        return (
            f"gemm {self.tall}x{self.wide} stages {self.stages} warps {self.warps} pieces {self.pieces} "
            f"programs {self.programs}{how}"
        )

    def cost(self, m: int, n: int, multiprocessors: int) -> float:
        """What the slowest multiprocessor computes, in elements of y; a small tile reads more for each."""
        tiles = -(-m // self.tall) * -(-n // self.wide)
        turns = -(-tiles // multiprocessors)
        return turns * self.tall * self.wide * (1 + 16 / self.tall + 16 / self.wide)


Tiling = Gemm | FewRowsTiling

FAST = (
    Gemm(128, 256, 3, 8, pieces=2, flat=True),
    Gemm(128, 256, 4, 8, pieces=2),
    Gemm(256, 128, 3, 8, pieces=2, flat=True),
    Gemm(128, 128, 4, 8, flat=True),
    Gemm(64, 128, 4, 4, programs=2),
    Gemm(64, 128, 3, 4, programs=3),
)
# Sums that are added up in float32 are in registers twice.
EXACT = (
    Gemm(128, 128, 3, 8, flat=True),
    Gemm(128, 128, 4, 8),
    Gemm(128, 128, 3, 8, double=True),
    Gemm(64, 128, 3, 4, programs=3),
    Gemm(64, 128, 4, 4, flat=True, programs=2),
)
# A pair of tiles, of gate and up.
PAIRED = (Gemm(128, 128, 3, 8, flat=True), Gemm(128, 128, 4, 8), Gemm(128, 64, 4, 8, flat=True))
PAIRED_EXACT = (Gemm(128, 64, 4, 8, flat=True), Gemm(128, 64, 4, 8), Gemm(64, 64, 4, 4, programs=2))


class Fp8Row(FewRows):
    """A scale for each row of the activations and of the weight, sums of 128 columns added in float32."""

    name = "fp8_row"
    efficiency = Efficiency(reading=0.75, multiplying=0.6, arithmetic="fp8")
    precision = 6e-3
    capability = (9, 0)
    form = packed = "fp8_row"
    taken = "fp8_row"
    output_formats = ("bf16", "f32", "f16")
    reads = Weights("fp8", "row", fast=False)

    def refuses(self, node: TensorNode) -> Declined | None:
        m, k = node.rows, node.weight[0].extents[1]
        if m > MOST and k % 16:
            reason = f"beyond {MOST} rows it takes k in sixteens, which the bulk-copy engine wants: k is {k}"
            return Declined(reason, "alignment")
        if m > MOST and len(node.outputs) > 1 and not self.side_by_side:
            return Declined(f"it writes several outputs of up to {MOST} rows, m is {m}", "shape")
        return too_long(node) if self.reads.fast else None

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [[self.taken], *(FLOATS for _ in node.inputs[1:])]

    def variants(self, node: TensorNode) -> Sequence[Tiling]:
        if node.rows <= MOST:
            return super().variants(node)
        covered, n, count = 1 << (node.rows - 1).bit_length(), _outputs(node), self.device.processors
        ordered = sorted(self.gemms(few_rows.is_gated(node)), key=lambda tiling: tiling.cost(covered, n, count))
        return few_rows.worth_choosing(node, ordered)

    def work(self, node: TensorNode) -> str:
        return super().work(node) if node.rows <= MOST else few_rows.work_of(self.name, node, _outputs(node))

    def gemms(self, gated: bool) -> Sequence[Gemm]:
        """Those for many rows."""
        if gated:
            return PAIRED if self.reads.fast else PAIRED_EXACT
        return FAST if self.reads.fast else EXACT

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        tiling = self.tiling(node)
        if not isinstance(tiling, Gemm):
            return super().bind(node, tensors, stream)
        o = Operands.of(node, replace(tensors, outputs=(tensors.matrix,)))
        # Two pieces of a tile of float32 are as large as one of bfloat16.
        pieces = 1 if o.gated else max(tiling.pieces, o.y[0].itemsize // 2 if tiling.wide > 128 else 1)
        descriptors = (_tiles(o.x, tiling.tall), _tiles(o.w, tiling.wide))
        args = (*descriptors, o.x_scales, o.scales, o.bias, o.residual, o.y[0], o.m, o.n, o.k)
        shape = (o.has_bias, o.has_residual, o.gated)
        how = (GROUP, tiling.stages, pieces, tiling.flat)
        tiles = triton.cdiv(o.m, tiling.tall) * triton.cdiv(o.n, tiling.wide)
        grid = (min(tiles, tiling.programs * self.device.processors),)
        if self.reads.scaled == "block":
            tiles_of = (*shape, tiling.tall, tiling.wide, *how)
            return bind(fp8_kernels.gemm_blocks, grid, *args, *tiles_of, stream=stream, num_warps=tiling.warps)
        sums = (self.reads.fast, tiling.double)
        flags = (self.reads.scaled == "row", *shape, *sums, tiling.tall, tiling.wide, DEEP, *how)
        return bind(fp8_kernels.gemm, grid, *args, *flags, stream=stream, num_warps=tiling.warps)


class Fp8RowFast(Fp8Row):
    """The same with the tensor cores' own sums, of fewer bits than float32 has and so of no more than 2048 products."""

    name = "fp8_row_fast"
    precision = 7e-3
    reads = Weights("fp8", "row")


class Fp8Tensor(Fp8Row):
    """One scale for all activations and one for the weight."""

    name = "fp8_tensor"
    form = packed = taken = "fp8_tensor"
    reads = Weights("fp8_one", "one", fast=False)

    def refuses(self, node: TensorNode) -> Declined | None:
        if len(node.weight) > 1:
            return Declined("its weights have one scale each: of several fp8_row takes them", "format")
        return super().refuses(node)


class Fp8TensorFast(Fp8Tensor):
    """The same with the tensor cores' own sums, of fewer bits than float32 has and so of no more than 2048 products."""

    name = "fp8_tensor_fast"
    precision = 7e-3
    reads = Weights("fp8_one", "one")


class Fp8Block(Fp8Row):
    """A scale for 128 columns of each row of the activations, and one for 128 by 128 of the weight."""

    name = "fp8_block"
    form = packed = "fp8_128x128"
    taken = "fp8_block"
    reads = Weights("fp8_block", "block", fast=False)

    def refuses(self, node: TensorNode) -> Declined | None:
        n, k = node.weight[0].extents
        if k % 128:
            return Declined(f"its scales are those of 128 columns, k is {k}", "alignment")
        if len(node.weight) > 1 and any(weight.extents[0] % 128 for weight in node.weight):
            return Declined(f"several weights lie below one another in blocks of 128 rows, n is {n}", "alignment")
        return super().refuses(node)


class Stacked(Fp8Row):
    """Products of many rows as one: the weights below one another, the results side by side."""

    ops = ("qkv", "mul_mat_pair")
    takes = {"m": f"{MOST + 1}.."}
    side_by_side = True


class Fp8RowStacked(Stacked, Fp8Row):
    """As Fp8Row."""


class Fp8RowFastStacked(Stacked, Fp8RowFast):
    """As Fp8RowFast."""


class Fp8BlockStacked(Stacked, Fp8Block):
    """As Fp8Block."""


def _outputs(node: TensorNode) -> int:
    """Columns of the result: of gate and up those of their product."""
    return node.weight[0].extents[0] if few_rows.is_gated(node) else few_rows.height(node)


def _tiles(matrix: torch.Tensor, rows: int) -> TensorDescriptor:
    """How the bulk-copy engine takes tiles of so many rows from a matrix."""
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, DEEP])
