"""Mixtures of experts on CUDA: routing, products by the chosen experts' matrices, and their weighted sum.

Nothing is read on the host: a captured graph has whatever experts its rows are given to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl

from kernelmux.contract import Efficiency, Kernel, Launch, Tensors, in_turn
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Weight
from kernelmux.graph.graph import TensorNode
from kernelmux.graph.ops.mul_mat_id import outputs_of
from kernelmux_triton.experts_kernels import group, grouped, one_place
from kernelmux_triton.few_rows_pack import PLANES
from kernelmux_triton.launch import bind
from kernelmux_triton.mul_mat_weights import packed, stored_bytes
from kernelmux_triton.rows import FLOATS, warps

FEW = 4
"""Rows up to which each place reads its expert's matrix by itself: few experts have two of them."""
TILE = 1024
"""Columns, or places, that a program takes at once."""


class Route(Kernel):
    """In float32; logits that are no numbers count as the least."""

    ops = ("route",)
    name = "f32"
    precision = 1e-11
    input_formats = FLOATS

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [["i32"], FLOATS]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (logits,), (ids, weights) = tensors.inputs, tensors.outputs
        m, experts = logits.shape
        sizes = (experts, triton.next_power_of_2(experts), node.top_k, triton.next_power_of_2(node.top_k))
        args = (logits, ids, weights, *sizes, node.renormalize, node.sigmoid, node.scale or 1.0)
        return bind(_route, (m,), *args, stream=stream, num_warps=1)


class ExpertSum(Kernel):
    """In float32, rounded once."""

    ops = ("expert_sum",)
    name = "f32"
    precision = 1e-11
    input_formats = output_formats = FLOATS

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (x, weights), (y,) = tensors.inputs, tensors.outputs
        m, n = y.shape
        wide = min(TILE, triton.next_power_of_2(n))
        args = (x, weights, y, n, weights.shape[1], wide)
        return bind(_expert_sum, (m, triton.cdiv(n, wide)), *args, stream=stream, num_warps=warps(wide))


class MulMatId(Kernel):
    """What the kernels of all weights share."""

    ops = ("mul_mat_id",)
    launches = 2
    output_formats = FLOATS
    form: ClassVar[str] = ""
    """How weights are kept; of `Dequant` as they are stored."""
    tiling: ClassVar[tuple[int, int]] = (64, 64)
    """Rows of W and columns that a program of many places takes at once."""

    def form_of(self, format: str) -> str:
        """How a weight of a format is kept."""
        return self.form

    def packed_bytes(self, node: TensorNode) -> int:
        return stored_bytes(node, self.form_of(node.weight[0].format))

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        return packed(weights, self.form_of(weights[0].format), device)

    def workspace(self, node: TensorNode) -> int:
        """The places of each expert, and how many there are."""
        m, top_k = node.inputs[1].extents
        return 0 if m <= FEW else 4 * node.experts * (m * top_k + 1)

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (x, ids), (y,) = tensors.inputs, tensors.outputs
        form, n, (_, k), (m, top_k) = self.form_of(node.weight[0].format), outputs_of(node), *_extents(node)
        planes = tensors.packed[: len(tensors.packed) - bool(node.bias)]
        w, scales, pairs = planes[0], planes[min(1, len(planes) - 1)], planes[-1]
        stored = (w, scales, pairs, tensors.packed[-1])
        told = (PLANES[form].weight if form in PLANES else "dense", bool(node.bias), top_k, x.shape[1] == k)
        if m <= FEW:
            wide = min(256, max(32, triton.next_power_of_2(k)))
            args = (x, ids, *stored, y, m, n, k, *told, 16, wide)
            return bind(one_place, (triton.cdiv(n, 16), m * top_k), *args, stream=stream, num_warps=4)
        assert tensors.workspace is not None
        counts, order = tensors.workspace.view(torch.int32).split([node.experts, node.experts * m * top_k])
        tall, wide = self.tiling
        rows = min(64, max(16, triton.next_power_of_2(m * top_k // node.experts)))
        list_places = bind(group, (node.experts,), ids, order, counts, m * top_k, TILE, stream=stream, num_warps=4)
        args = (x, order, counts, *stored, y, m * top_k, n, k, *told, rows, tall, wide)
        multiply = bind(grouped, (triton.cdiv(n, tall), node.experts), *args, stream=stream, num_warps=4)
        return in_turn(list_places, multiply)


def _extents(node: TensorNode) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return node.weight[0].extents, node.inputs[1].extents


class MulMatIdF32(MulMatId):
    """Weights in float32."""

    name = form = packed = "f32"
    precision = 1e-11
    input_formats = FLOATS
    efficiency = Efficiency(reading=0.6, multiplying=0.3, arithmetic="f32")
    tiling = (32, 32)


class MulMatIdBf16(MulMatId):
    """Weights in bfloat16; of more than a few rows activations are rounded to it too."""

    name = form = packed = "bf16"
    precision = 5e-5
    input_formats = ("bf16", "f32")
    efficiency = Efficiency(reading=0.6, multiplying=0.2, arithmetic="bf16")


class MulMatIdF16(MulMatId):
    """Weights and activations in float16."""

    name = form = packed = "f16"
    precision = 1e-6
    takes = {"weight_format": ("f16",)}
    input_formats = ("f16",)
    efficiency = Efficiency(reading=0.6, multiplying=0.2, arithmetic="bf16")


class MulMatIdDequant(MulMatId):
    """Blocks and 4-bit groups decoded in registers: exact for a few rows, else all is in bfloat16."""

    name = packed = "dequant"
    precision = 5e-5
    takes = {"weight_format": tuple(PLANES)}
    input_formats = ("bf16", "f32", "f16")
    efficiency = Efficiency(reading=0.2, multiplying=0.1, arithmetic="bf16")

    def form_of(self, format: str) -> str:
        return format


@triton.jit
def _route(
    logits, ids, weights,
    EXPERTS: tl.constexpr, WIDE: tl.constexpr, TOP_K: tl.constexpr, CHOSEN: tl.constexpr,
    RENORMALIZE: tl.constexpr, SIGMOID: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """A program takes a row of logits [m, EXPERTS], and finds one expert after another; CHOSEN covers TOP_K."""
    row = tl.program_id(0).to(tl.int64)
    expert, place = tl.arange(0, WIDE), tl.arange(0, CHOSEN)
    values = tl.load(logits + row * EXPERTS + expert, mask=expert < EXPERTS, other=0.0).to(tl.float32)
    values = tl.where(values == values, values, -float("inf"))
    left = expert < EXPERTS
    largest = tl.max(tl.where(left, values, -float("inf")), axis=0)
    total = tl.sum(tl.where(left, tl.exp(values - largest), 0.0), axis=0)
    found = tl.zeros([CHOSEN], tl.int32)
    shares = tl.zeros([CHOSEN], tl.float32)
    for number in range(TOP_K):
        peak = tl.max(tl.where(left, values, -float("inf")), axis=0)
        chosen = tl.min(tl.where(left & (values == peak), expert, WIDE), axis=0)
        left = left & (expert != chosen)
        found = tl.where(place == number, chosen, found)
        share = 1.0 / (1.0 + tl.exp(-peak)) if SIGMOID else tl.exp(peak - largest)
        shares = tl.where(place == number, share, shares)
    if RENORMALIZE:
        total = tl.sum(shares, axis=0)
    shares = SCALE * (shares if SIGMOID else shares / total)
    at = row * TOP_K + place
    tl.store(ids + at, found, mask=place < TOP_K)
    tl.store(weights + at, shares.to(weights.dtype.element_ty), mask=place < TOP_K)


@triton.jit
def _expert_sum(x, weights, y, COLUMNS: tl.constexpr, TOP_K: tl.constexpr, WIDE: tl.constexpr):
    """A program takes WIDE columns of a row: x [m, TOP_K * COLUMNS], weights [m, TOP_K], y [m, COLUMNS]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    total = tl.zeros([WIDE], tl.float32)
    for number in range(TOP_K):
        place = row * TOP_K + number
        values = tl.load(x + place * COLUMNS + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
        total += tl.load(weights + place).to(tl.float32) * values
    tl.store(y + row * COLUMNS + column, total.to(y.dtype.element_ty), mask=column < COLUMNS)
