"""embed on CUDA: rows gathered and converted by one Triton kernel, from dense tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from kernelmux.contract import Declined, Kernel, Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_triton.launch import bind
from kernelmux_triton.rows import FLOATS

TILE = 1024
"""Columns that a program copies."""


class Rows(Kernel):
    """Of a table that is computed."""

    ops = ("embed",)
    name = "rows"
    precision = 1e-11
    input_formats: Sequence[str] = FLOATS
    output_formats: Sequence[str] = FLOATS

    def refuses(self, node: TensorNode) -> Declined | None:
        return Declined("its table is computed, not a weight", "unsupported") if node.weight else None

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (ids, table), (y,) = (*tensors.inputs, *tensors.packed), tensors.outputs
        m, k = y.shape
        wide = min(TILE, triton.next_power_of_2(k))
        return bind(_gather, (m, triton.cdiv(k, wide)), ids, table, y, k, wide, stream=stream, num_warps=4)


class F32(Rows):
    """The table in float32."""

    name = "f32"
    packed = "f32"

    def refuses(self, node: TensorNode) -> Declined | None:
        return None if node.weight else Declined("its table is a weight", "unsupported")


class Bf16(F32):
    """The same in bfloat16."""

    name = "bf16"
    precision = 1e-5
    packed = "bf16"
    output_formats = ("bf16", "f32")


@triton.jit
def _gather(ids, table, y, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    source = tl.load(ids + row).to(tl.int64)
    values = tl.load(table + source * COLUMNS + column, mask=column < COLUMNS)
    tl.store(y + row * COLUMNS + column, values.to(y.dtype.element_ty), mask=column < COLUMNS)
