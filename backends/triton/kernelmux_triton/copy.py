"""copy on CUDA: keys and values scattered into the paged cache in one Triton kernel."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from kernelmux.contract import Kernel, Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_triton.launch import bind
from kernelmux_triton.rows import FLOATS, load_row, planes, scaling, store_row, warps


class Copy(Kernel):
    """Rounded once, to the cache's format; the device reads the slots."""

    ops = ("copy",)
    name = "f32"
    precision = 1e-11
    input_formats = FLOATS

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        k, v, slots, k_cache, v_cache = tensors.inputs
        heads, dim = node.num_kv_heads, node.head_dim
        (keys, k_scales, _), (values, v_scales, _) = planes(k_cache), planes(v_cache)
        # A head of a position is a row: where the cache has scales it has one of its own.
        args = (k, v, slots, keys, k_scales, values, v_scales, dim, triton.next_power_of_2(dim))
        return bind(
            _copy, (len(k), heads), *args, scaling(node.inputs[3].format, dim)[0], stream=stream, num_warps=warps(dim)
        )


@triton.jit
def _copy(
    k, v, slots, k_cache, k_scales, v_cache, v_scales,
    DIM: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """k, v [m, heads, DIM] to caches [slots, heads, DIM], row i to slots[i]; a row of slot -1 stays out.

    One program a row and head. Bytes: each number read once and written once.
    """
    row, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        source, target = row * heads + head, slot * heads + head
        key = load_row(k, k, source, 0, 0, DIM, 0, False, False, WIDE)
        store_row(k_cache, k_scales, k_scales, target, 0, 0, key, DIM, GROUP, False)
        value = load_row(v, v, source, 0, 0, DIM, 0, False, False, WIDE)
        store_row(v_cache, v_scales, v_scales, target, 0, 0, value, DIM, GROUP, False)
