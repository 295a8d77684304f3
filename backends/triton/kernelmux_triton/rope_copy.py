"""rope_copy: queries turned, keys turned and values scattered into the cache, in one Triton kernel.

Queries, keys and values may be columns of one matrix, as one stacked product writes them.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from kernelmux.contract import Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_triton.launch import bind
from kernelmux_triton.rope import Rope, angle, blocks, rotation_args, turn
from kernelmux_triton.rows import FLOATS


class RopeCopy(Rope):
    """As Rope; what is stored is rounded once, to the cache's format."""

    ops = ("rope_copy",)
    takes = {"cache_format": FLOATS}
    strided = True

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        q, k, v, positions, slots, k_cache, v_cache = tensors.inputs
        grid = (len(positions), blocks(node.num_heads) + 2 * blocks(node.num_kv_heads))
        strides = (q.stride(0), k.stride(0), v.stride(0))
        args = (q, k, v, tensors.outputs[0], k_cache, v_cache, positions, slots, *strides)
        return bind(
            _rope_copy, grid, *args, *rotation_args(node, positions, tensors.packed), stream=stream, num_warps=4
        )


@triton.jit
def _rope_copy(
    q, k, v, q_out, k_cache, v_cache, positions, slots,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    turns, divisors,
    MAGNITUDE: tl.constexpr, DIVIDED: tl.constexpr, ADJACENT: tl.constexpr, DIMS: tl.constexpr, DIM: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """Of a row queries turned into q_out, keys turned into their cache, values into theirs."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    cached = slot * KEYS * DIM
    block = tl.program_id(1)
    keys, values = tl.cdiv(QUERIES, TALL), tl.cdiv(QUERIES, TALL) + tl.cdiv(KEYS, TALL)
    if block < keys:
        cos, sin = angle(row, positions, turns, divisors, MAGNITUDE, DIVIDED, DIMS, WIDE)
        q_row = q_out + row * QUERIES * DIM
        turn(q + row * Q_STRIDE, q_row, block * TALL, cos, sin, ADJACENT, DIMS, DIM, QUERIES, WIDE, TALL)
    elif block < values:
        if slot >= 0:
            cos, sin = angle(row, positions, turns, divisors, MAGNITUDE, DIVIDED, DIMS, WIDE)
            first = (block - keys) * TALL
            turn(k + row * K_STRIDE, k_cache + cached, first, cos, sin, ADJACENT, DIMS, DIM, KEYS, WIDE, TALL)
    else:
        if slot >= 0:
            at = (block - values) * TALL * DIM + tl.arange(0, TALL * 2 * WIDE)
            inside = (at < (block - values + 1) * TALL * DIM) & (at < KEYS * DIM)
            read = tl.load(v + row * V_STRIDE + at, mask=inside)
            tl.store(v_cache + cached + at, read.to(v_cache.dtype.element_ty), mask=inside)
