"""mul_mat and what is fused with it of e4m3 weights and activations, by how they are scaled, for any number of rows.

Up to 64 rows the weights are read once, as in few_rows.py; more rows are tiles of the tensor cores. Weights in any
format are quantised once; one that is stored in the same scheme is used as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from kernelmux.contract.device import Device
from kernelmux.contract.hookspecs import Declined, Kernel, Launch, Tensors
from kernelmux.graph.formats import Weight
from kernelmux.graph.graph import TensorNode
from kernelmux_triton import few_rows, fp8_kernels, tuning
from kernelmux_triton.few_rows import FLOATS, MOST, Operands
from kernelmux_triton.few_rows_tilings import Tiling as FewRowsTiling
from kernelmux_triton.few_rows_tilings import Weights
from kernelmux_triton.launch import bind, multiprocessors
from kernelmux_triton.mul_mat_weights import packed, stored_bytes

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


def offer(node: TensorNode, m: int, device: Device) -> list[Fp8Row | Declined]:
    """Every fp8 kernel, or why not."""
    kernels = (Fp8Row(device), Fp8Tensor(device), Fp8RowFast(device), Fp8TensorFast(device), Fp8Block(device))
    return [kernel.refusal(node, m) or kernel for kernel in kernels]


class Fp8Row(Kernel):
    """A scale for each row of the activations and of the weight, sums of 128 columns added in float32.

    `tiling` is for measurements: one other than what is chosen by itself.
    """

    name = "fp8_row"
    precision = 6e-3
    form = packed = "fp8_row"
    taken = "fp8_row"
    weights = Weights("fp8", "row", fast=False)
    # Of few rows and long ones the parts of split sums are added by a second one.
    launches = 2

    def __init__(self, device: Device, tiling: Tiling | None = None) -> None:
        self.device, self.tiling = device, tiling

    def refusal(self, node: TensorNode, m: int) -> Declined | None:
        """Why the kernel does not take a node of up to m rows."""
        if self.device.capability is None or self.device.capability < (9, 0):
            reason = f"it needs compute capability 9.0, this device has {self.device.capability}"
            return Declined(reason, "capability", self.name)
        k = node.weight[0].extents[1]
        if m > MOST and k % 16:
            reason = f"beyond {MOST} rows it takes k in sixteens, which the bulk-copy engine wants: k is {k}"
            return Declined(reason, "alignment", self.name)
        if m > MOST and node.op == "qkv":
            return Declined(f"it writes three outputs of up to {MOST} rows, m is {m}", "shape", self.name)
        return None

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [[self.taken], *(FLOATS for _ in node.inputs[1:])]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [("bf16", "f32", "f16") for _ in node.outputs]

    def packed_bytes(self, node: TensorNode) -> int:
        return stored_bytes(node, self.form)

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        return packed(weights, self.form, device)

    def workspace(self, node: TensorNode) -> int:
        chosen = self.chosen(node)
        return 0 if isinstance(chosen, Gemm) else few_rows.workspace(node, chosen, self.device)

    def chosen(self, node: TensorNode, measure: Any = None) -> Tiling:
        """The tiling for a node whose row count is known."""
        if self.tiling is not None:
            return self.tiling
        m, n = node.inputs[0].extents[0], node.weight[0].extents[0]
        if m <= MOST:
            return few_rows.choose(self.weights, node, self.device, measure)
        tilings, shape = self.gemms(few_rows.is_gated(node)), self.shape(node)
        count = multiprocessors(self.device)
        default = min(tilings, key=lambda tiling: tiling.cost(shape.m, n, count))
        return tuning.choose(self.device, shape, tilings, default, measure)

    def shape(self, node: TensorNode) -> tuning.Shape:
        """What a tiling is chosen by."""
        m, (n, k) = node.inputs[0].extents[0], node.weight[0].extents
        if m <= MOST:
            return few_rows.shape_of(self.weights, node)
        return tuning.Shape.of(f"{self.name}{' gated' if few_rows.is_gated(node) else ''}", m, n, k)

    def tilings(self, node: TensorNode) -> Sequence[Tiling]:
        """Those that may be chosen for a node."""
        if (m := node.inputs[0].extents[0]) <= MOST:
            return self.weights.tilings(m)
        return self.gemms(few_rows.is_gated(node))

    def gemms(self, gated: bool) -> Sequence[Gemm]:
        """Those for many rows."""
        if gated:
            return PAIRED if self.weights.fast else PAIRED_EXACT
        return FAST if self.weights.fast else EXACT

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        tiling = self.chosen(node)
        if not isinstance(tiling, Gemm):
            return few_rows.bind_few(self.weights, tiling, node, tensors, self.device)
        o = Operands.of(node, tensors)
        # Two pieces of a tile of float32 are as large as one of bfloat16.
        pieces = 1 if o.gated else max(tiling.pieces, o.y[0].itemsize // 2 if tiling.wide > 128 else 1)
        descriptors = (_tiles(o.x, tiling.tall), _tiles(o.w, tiling.wide))
        args = (*descriptors, o.x_scales, o.scales, o.bias, o.residual, o.y[0], o.m, o.n, o.k)
        shape = (o.has_bias, o.has_residual, o.gated)
        how = (GROUP, tiling.stages, pieces, tiling.flat)
        tiles = triton.cdiv(o.m, tiling.tall) * triton.cdiv(o.n, tiling.wide)
        grid = (min(tiles, tiling.programs * multiprocessors(self.device)),)
        if self.weights.scaled == "block":
            tiles_of = (*shape, tiling.tall, tiling.wide, *how)
            return bind(fp8_kernels.gemm_blocks, grid, *args, *tiles_of, num_warps=tiling.warps)
        sums = (self.weights.fast, tiling.double)
        flags = (self.weights.scaled == "row", *shape, *sums, tiling.tall, tiling.wide, DEEP, *how)
        return bind(fp8_kernels.gemm, grid, *args, *flags, num_warps=tiling.warps)


class Fp8RowFast(Fp8Row):
    """The same with the tensor cores' own sums, of fewer bits than float32 has."""

    name = "fp8_row_fast"
    precision = 7e-3
    weights = Weights("fp8", "row")


class Fp8Tensor(Fp8Row):
    """One scale for all activations and one for the weight."""

    name = "fp8_tensor"
    form = packed = taken = "fp8_tensor"
    weights = Weights("fp8_one", "one", fast=False)

    def refusal(self, node: TensorNode, m: int) -> Declined | None:
        if len(node.weight) > 1:
            return Declined("its weights have one scale each: of several fp8_row takes them", "format", self.name)
        return super().refusal(node, m)


class Fp8TensorFast(Fp8Tensor):
    """The same with the tensor cores' own sums, of fewer bits than float32 has."""

    name = "fp8_tensor_fast"
    precision = 7e-3
    weights = Weights("fp8_one", "one")


class Fp8Block(Fp8Row):
    """A scale for 128 columns of each row of the activations, and one for 128 by 128 of the weight."""

    name = "fp8_block"
    form = packed = "fp8_128x128"
    taken = "fp8_block"
    weights = Weights("fp8_block", "block", fast=False)

    def refusal(self, node: TensorNode, m: int) -> Declined | None:
        n, k = node.weight[0].extents
        if k % 128:
            return Declined(f"its scales are those of 128 columns, k is {k}", "alignment", self.name)
        if len(node.weight) > 1 and any(weight.extents[0] % 128 for weight in node.weight):
            return Declined(
                f"several weights lie below one another in blocks of 128 rows, n is {n}", "alignment", self.name
            )
        return super().refusal(node, m)


def _tiles(matrix: torch.Tensor, rows: int) -> TensorDescriptor:
    """How the bulk-copy engine takes tiles of so many rows from a matrix."""
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, DEEP])
