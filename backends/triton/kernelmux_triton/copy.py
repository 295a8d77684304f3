"""copy on CUDA: keys and values scattered into the paged cache in one Triton kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Kernel, Launch, Tensors
from kernelmux_triton.launch import bind
from kernelmux_triton.rows import FLOATS

WIDEST = 1024
"""Columns that a program copies."""


class Copy(Kernel):
    """Rounded once, to the cache's format; the device reads the slots."""

    name = "f32"
    precision = 1e-11

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS, FLOATS, *([value.format] for value in node.inputs[2:])]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        k, v, slots, k_cache, v_cache = tensors.inputs
        m, columns = k.shape
        wide = min(WIDEST, triton.next_power_of_2(columns))
        grid = (m, triton.cdiv(columns, wide))
        return bind(_copy, grid, k, v, slots, k_cache, v_cache, columns, wide, num_warps=4)


@triton.jit
def _copy(k, v, slots, k_cache, v_cache, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
        inside = column < COLUMNS
        source, target = row * COLUMNS + column, slot * COLUMNS + column
        tl.store(k_cache + target, tl.load(k + source, mask=inside).to(k_cache.dtype.element_ty), mask=inside)
        tl.store(v_cache + target, tl.load(v + source, mask=inside).to(v_cache.dtype.element_ty), mask=inside)
