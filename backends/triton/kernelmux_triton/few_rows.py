"""mul_mat and what is fused with it for up to 64 rows: weights of 4, 8 and 16 bits, read once and decoded on the way.

One class for all of these ops: what is added, gated or split is told by the node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from kernelmux.contract import Declined, Efficiency, Kernel, Launch, Tensors, in_turn
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Weight, as_tuple
from kernelmux.graph.graph import TensorNode
from kernelmux_triton import few_rows_kernels
from kernelmux_triton.few_rows_gemv import gemv
from kernelmux_triton.few_rows_pack import PLANES
from kernelmux_triton.few_rows_tilings import Dot, Gemv, Weights
from kernelmux_triton.launch import bind
from kernelmux_triton.mul_mat_weights import packed, stored_bytes
from kernelmux_triton.rows import FLOATS

MOST = 64
"""Rows that are multiplied at once: the weights are read once."""
LEAST = 2**23
"""Weights from which one tiling is much faster than another."""
PRODUCTS = ("mul_mat", "mul_mat_add", "gate_up_swiglu", "qkv", "mul_mat_pair")


class FewRows(Kernel):
    """What the kernels of all weights share."""

    ops: tuple[str, ...] = PRODUCTS
    efficiency = Efficiency(reading=0.85, multiplying=0.25, arithmetic="bf16")
    launches = 2
    input_formats: Sequence[str] = ("bf16", "f32", "f16")
    """Of what is multiplied; a residual may be any of FLOATS."""
    output_formats: Sequence[str] = FLOATS
    form: str
    """How weights are kept; of `Dequant` as they are stored."""
    reads: Weights

    def weights(self, node: TensorNode) -> Weights:
        """How the kernel reads a node's weights."""
        return self.reads

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [self.input_formats, *(FLOATS for _ in node.inputs[1:])]

    def packed_bytes(self, node: TensorNode) -> int:
        return stored_bytes(node, self.form)

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        return packed(weights, self.form, device)

    def variants(self, node: TensorNode) -> Sequence[Any]:
        return worth_choosing(node, self.weights(node).tilings(node.rows))

    def tiling(self, node: TensorNode) -> Any:
        """The variant that it was told to take, or the first."""
        return self.variant or self.variants(node)[0]

    def work(self, node: TensorNode) -> str:
        return work_of(self.weights(node).name, node, height(node))

    def workspace(self, node: TensorNode) -> int:
        tiling, m, rows = self.tiling(node), node.inputs[0].extents[0], height(node)
        if not isinstance(tiling, Dot):
            return 0
        # The parts of sums whose columns are split.
        splits, _ = tiling.splits(rows, node.weight[0].extents[1], self.device.processors)
        return 4 * splits * m * rows if splits > 1 else 0

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        """Packed are planes of W (two or three, one where dense), then the bias."""
        weights, tiling, operands = self.weights(node), self.tiling(node), Operands.of(node, tensors)
        if isinstance(tiling, Gemv):
            return _bind_gemv(weights, tiling, operands, stream)
        return _bind_dot(weights, tiling, operands, tensors.workspace, self.device, stream)


class Fp8Weight(FewRows):
    """Weights in e4m3 with a scale a row, activations in floats; from five rows on these are rounded to bfloat16."""

    name = "fp8_weight"
    precision = 6e-3
    takes = {"m": f"..{MOST}"}
    reads = Weights("fp8")
    form = packed = "fp8_row"


class Dequant(FewRows):
    """Blocks and 4-bit groups decoded in registers: exact for up to four rows, else all is in bfloat16."""

    name = packed = "dequant"
    efficiency = Efficiency(reading=0.27, multiplying=0.2, arithmetic="bf16")
    precision = 5e-5
    takes = {"m": f"..{MOST}", "weight_format": tuple(PLANES), "weight_formats": tuple(PLANES)}

    def refuses(self, node: TensorNode) -> Declined | None:
        formats = sorted({weight.format for weight in node.weight})
        if len(formats) > 1:
            return Declined(f"it takes weights of one format, not {' and '.join(formats)}", "format")
        return None

    def weights(self, node: TensorNode) -> Weights:
        return Weights(PLANES[node.weight[0].format].weight)

    def packed_bytes(self, node: TensorNode) -> int:
        return stored_bytes(node, node.weight[0].format)

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        return packed(weights, weights[0].format, device)


class Bf16(FewRows):
    """Weights in bfloat16; from five rows on activations are rounded to it too."""

    name = form = packed = "bf16"
    precision = 5e-5
    takes = {"m": f"..{MOST}", "weight_format": ("bf16",), "weight_formats": ("bf16",)}
    reads = Weights("dense")
    input_formats = ("bf16", "f32")


class F16(FewRows):
    """Weights and activations in float16."""

    name = form = packed = "f16"
    precision = 1e-6
    takes = {"m": f"..{MOST}", "weight_format": ("f16",), "weight_formats": ("f16",)}
    reads = Weights("dense")
    input_formats = ("f16",)


def worth_choosing(node: TensorNode, tilings: Sequence[Any]) -> Sequence[Any]:
    """All tilings, or the first alone: a small matrix is read in few microseconds however it is tiled."""
    return tilings if height(node) * node.weight[0].extents[1] >= LEAST else tilings[:1]


def work_of(name: str, node: TensorNode, n: int) -> str:
    """A class of work: the kernel, rows (a power of two that covers them), outputs and inputs."""
    gated = " gated" if is_gated(node) else ""
    return f"{name}{gated} m{1 << (node.rows - 1).bit_length()} {n}x{node.weight[0].extents[1]}"


def height(node: TensorNode) -> int:
    """Rows of all of a node's weights."""
    return sum(weight.extents[0] for weight in node.weight)


def is_gated(node: TensorNode) -> bool:
    """Whether gate and up are multiplied, for one output."""
    return node.op == "gate_up_swiglu"


@dataclass(frozen=True, eq=False)
class Operands:
    """A node's tensors as the kernels take them: what is not there is any other tensor, which no one reads."""

    x: torch.Tensor
    x_scales: torch.Tensor
    w: torch.Tensor
    scales: torch.Tensor
    pairs: torch.Tensor
    bias: torch.Tensor
    residual: torch.Tensor
    y: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    has_bias: bool
    has_residual: bool
    gated: bool
    outputs: int
    m: int
    n: int
    k: int
    ends: tuple[int, int]

    @staticmethod
    def of(node: TensorNode, tensors: Tensors) -> Operands:
        """Of a bound node."""
        x, *x_scales = as_tuple(tensors.inputs[0])
        planes = tensors.packed[: len(tensors.packed) - bool(node.bias)]
        w, y = planes[0], tensors.outputs
        n = [weight.extents[0] for weight in node.weight]
        gated = is_gated(node)
        return Operands(
            x=x,
            x_scales=x_scales[0] if x_scales else x,
            w=w,
            scales=planes[1] if len(planes) > 1 else w,
            pairs=planes[2] if len(planes) > 2 else w,
            bias=tensors.packed[-1] if node.bias else w,
            residual=tensors.inputs[1] if len(tensors.inputs) > 1 else x,
            y=(y[0], y[1 % len(y)], y[2 % len(y)]),
            has_bias=bool(node.bias),
            has_residual=len(tensors.inputs) > 1,
            gated=gated,
            outputs=len(y),
            m=len(x),
            n=n[0] if gated else sum(n),
            k=x.shape[1],
            ends=(n[0], n[0] + n[1]) if len(y) > 1 else (0, 0),
        )

    @property
    def rows(self) -> int:
        """Rows of W."""
        return 2 * self.n if self.gated else self.n


def _bind_gemv(weights: Weights, tiling: Gemv, o: Operands, stream: Any) -> Launch:
    held = tiling.nbytes // o.w.itemsize
    lane = 16 // o.w.itemsize
    columns = 2 if few_rows_kernels.is_nibbles(weights.weight) else 1
    wide = tiling.wide(o.k, held * columns)
    rows = triton.next_power_of_2(o.m)
    args = (o.x, o.w, o.scales, o.pairs, o.bias, o.residual, *o.y, o.m, o.n, o.k, *o.ends)
    flags = (weights.weight, rows, o.has_bias, o.has_residual, o.gated, o.outputs)
    grid = (triton.cdiv(o.rows, tiling.tall),)
    return bind(
        gemv, grid, *args, *flags, tiling.tall, wide, lane, tiling.stages, stream=stream, num_warps=tiling.warps
    )


def _bind_dot(
    weights: Weights, tiling: Dot, o: Operands, scratch: torch.Tensor | None, device: Device, stream: Any
) -> Launch:
    splits, span = tiling.splits(o.rows, o.k, device.processors)
    rows = max(16, triton.next_power_of_2(o.m))
    parts = o.x_scales if scratch is None or splits == 1 else scratch.view(torch.float32)
    sizes = (o.m, o.n, o.k, *o.ends)
    pairs = weights.weight == "fp8" and weights.scaled == "no" and o.k % 2 == 0
    w = o.w.view(torch.int16) if pairs else o.w
    args = (o.x, o.x_scales, w, o.scales, o.pairs, o.bias, o.residual, *o.y, parts, *sizes, span)
    shape = (o.has_bias, o.has_residual, o.gated, o.outputs)
    imprecise = None if weights.fast else 128
    flags = (weights.weight, weights.scaled, rows, *shape, splits > 1, imprecise)
    tiles = triton.cdiv(o.rows, tiling.tall)
    multiply = bind(
        few_rows_kernels.dot,
        (tiles, splits),
        *(*args, *flags, tiling.tall, tiling.wide, tiling.stages, pairs, not o.x.is_cpu),
        stream=stream,
        num_warps=tiling.warps,
    )
    if splits == 1:
        return multiply
    wide = 256
    reduced = (parts, o.bias, o.residual, *o.y, o.m, o.n, *o.ends, splits, *shape, wide)
    add = bind(few_rows_kernels.reduce, (triton.cdiv(o.n, wide), o.m), *reduced, stream=stream, num_warps=2)
    return in_turn(multiply, add)
