"""rope and copy of the rows that one GEMM of three stacked weights gives, in one Triton kernel: half of qkv_rope_copy.

A backend that has such a GEMM binds this after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernelmux.contract.hookspecs import Launch
from kernelmux.graph.formats import Weight
from kernelmux.graph.graph import TensorNode
from kernelmux_triton.launch import bind
from kernelmux_triton.rope import angle, blocks, rotation_args, turn


def split_weights(weights: Sequence[Weight]) -> tuple[Sequence[Weight], Sequence[Weight], Sequence[Weight]]:
    """The three matrices of a qkv_rope_copy node, its rope's divisors or none, its three biases or none."""
    matrices, rest = weights[:3], weights[3:]
    # Divisors are one vector, and come before the biases.
    return matrices, rest[: len(rest) % 3], rest[len(rest) % 3 :]


def bind_rope_copy(
    node: TensorNode,
    x: torch.Tensor,
    q: torch.Tensor,
    caches: Sequence[torch.Tensor],
    positions: torch.Tensor,
    slots: torch.Tensor,
    divisors: Sequence[torch.Tensor],
) -> Launch:
    """The call that turns and scatters x [m, (num_heads + 2 * num_kv_heads) * head_dim] of a qkv_rope_copy node.

    Queries go to q [m, num_heads * head_dim], keys and values to the two `caches`; `divisors` of the rope, or none.
    """
    grid = (len(positions), blocks(node.num_heads) + 2 * blocks(node.num_kv_heads))
    args = (x, q, *caches, positions, slots, *rotation_args(node, positions, divisors))
    return bind(_rope_copy, grid, *args, num_warps=4)


@triton.jit
def _rope_copy(
    x,
    q_out,
    k_cache,
    v_cache,
    positions,
    slots,
    turns,
    divisors,
    MAGNITUDE: tl.constexpr,
    DIVIDED: tl.constexpr,
    ADJACENT: tl.constexpr,
    DIMS: tl.constexpr,
    DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDE: tl.constexpr,
    TALL: tl.constexpr,
):
    """Of a row [queries, keys, values]: queries turned into q, keys turned into their cache, values into theirs."""
    row = tl.program_id(0).to(tl.int64)
    x += row * (QUERIES + 2 * KEYS) * DIM
    slot = tl.load(slots + row).to(tl.int64)
    cached = slot * KEYS * DIM
    block = tl.program_id(1)
    keys, values = tl.cdiv(QUERIES, TALL), tl.cdiv(QUERIES, TALL) + tl.cdiv(KEYS, TALL)
    if block < keys:
        cos, sin = angle(row, positions, turns, divisors, MAGNITUDE, DIVIDED, DIMS, WIDE)
        q_row = q_out + row * QUERIES * DIM
        turn(x, q_row, block * TALL, cos, sin, ADJACENT, DIMS, DIM, QUERIES, WIDE, TALL)
    elif block < values:
        if slot >= 0:
            cos, sin = angle(row, positions, turns, divisors, MAGNITUDE, DIVIDED, DIMS, WIDE)
            k_row = x + QUERIES * DIM
            first = (block - keys) * TALL
            turn(k_row, k_cache + cached, first, cos, sin, ADJACENT, DIMS, DIM, KEYS, WIDE, TALL)
    else:
        if slot >= 0:
            at = (block - values) * TALL * DIM + tl.arange(0, TALL * 2 * WIDE)
            inside = (at < (block - values + 1) * TALL * DIM) & (at < KEYS * DIM)
            v_row = x + (QUERIES + KEYS) * DIM
            tl.store(v_cache + cached + at, tl.load(v_row + at, mask=inside).to(v_cache.dtype.element_ty), mask=inside)
