"""embed on CUDA: rows gathered and converted by one Triton kernel, from dense tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kernelmux.contract import Declined, Kernel, Launch, Tensors
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Weight
from kernelmux.graph.graph import TensorNode
from kernelmux_triton.launch import bind
from kernelmux_triton.mul_mat_weights import packed, stored_bytes
from kernelmux_triton.rows import FLOATS

TILE = 1024
"""Columns that a program copies."""


class Rows(Kernel):
    """Of a table that is computed."""

    ops = ("embed",)
    name = "rows"
    precision = 1e-11

    def refuses(self, node: TensorNode) -> Declined | None:
        return Declined("its table is computed, not a weight", "unsupported") if node.weight else None

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [["i32"], FLOATS]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (ids, table), (y,) = tensors.inputs, tensors.outputs
        return _bind(ids, table, y, stream)


class F32(Kernel):
    """The table in float32."""

    ops = ("embed",)
    name = "f32"
    precision = 1e-11
    packed = "f32"

    def refuses(self, node: TensorNode) -> Declined | None:
        return None if node.weight else Declined("its table is a weight", "unsupported")

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [["i32"]]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS]

    def packed_bytes(self, node: TensorNode) -> int:
        return stored_bytes(node, self.packed)

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        return packed(weights, self.packed, device)

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (ids,), (table,), (y,) = tensors.inputs, tensors.packed, tensors.outputs
        return _bind(ids, table, y, stream)


class Bf16(F32):
    """The same in bfloat16."""

    name = "bf16"
    precision = 1e-5
    packed = "bf16"

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [["bf16", "f32"]]


def _bind(ids: torch.Tensor, table: torch.Tensor, y: torch.Tensor, stream: Any) -> Launch:
    m, k = y.shape
    wide = min(TILE, triton.next_power_of_2(k))
    return bind(_gather, (m, triton.cdiv(k, wide)), ids, table, y, k, wide, stream=stream, num_warps=4)


@triton.jit
def _gather(ids, table, y, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    source = tl.load(ids + row).to(tl.int64)
    values = tl.load(table + source * COLUMNS + column, mask=column < COLUMNS)
    tl.store(y + row * COLUMNS + column, values.to(y.dtype.element_ty), mask=column < COLUMNS)
