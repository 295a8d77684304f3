"""rope on CUDA: queries and keys in one Triton kernel, whose rotation rope_copy.py shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from kernelmux.contract import Kernel, Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux.graph.ops import Rotation
from kernelmux_triton.launch import bind
from kernelmux_triton.rows import FLOATS

HEADS = 8
"""Heads that a program turns: the angles of a row are computed once for them."""


class Rope(Kernel):
    """Angles in float64 up to whole turns, the rest in float32."""

    ops: tuple[str, ...] = ("rope",)
    name = "f32"
    precision = 1e-11
    packed = "f32"
    input_formats = output_formats = FLOATS

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        q, k, positions = tensors.inputs
        grid = (len(positions), blocks(node.num_heads) + blocks(node.num_kv_heads))
        args = (q, k, *tensors.outputs, positions, *rotation_args(node, positions, tensors.packed))
        return bind(_rope, grid, *args, stream=stream, num_warps=4)


def rotation_args(
    node: TensorNode, positions: torch.Tensor, divisors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | float | int, ...]:
    """The last arguments of a kernel that rotates, from `turns` to `TALL`."""
    rotation = node.rotation
    assert rotation is not None
    turns = _turns(rotation, positions.device)
    return (
        turns,
        # Without divisors this is never read.
        divisors[0] if divisors else turns,
        rotation.magnitude,
        bool(divisors),
        rotation.pairing == "adjacent",
        rotation.dims,
        node.head_dim,
        node.num_heads,
        node.num_kv_heads,
        # Holds the pairs, what passes, and half a head.
        triton.next_power_of_2(max(node.head_dim - rotation.dims, -(-node.head_dim // 2))),
        HEADS,
    )


def blocks(heads: int) -> int:
    """Programs that so many heads take."""
    return -(-heads // HEADS)


@lru_cache(maxsize=16)
def _turns(rotation: Rotation, device: torch.device) -> torch.Tensor:
    """Turns a position, one a pair, in float64: every layer's, so made once."""
    # Divided on the host: a launch on another stream would not wait for the device to do it.
    return (torch.tensor(rotation.frequencies(), dtype=torch.float64) / (2 * math.pi)).to(device)


@triton.jit
def _rope(
    q, k, q_out, k_out, positions, turns, divisors,
    MAGNITUDE: tl.constexpr, DIVIDED: tl.constexpr, ADJACENT: tl.constexpr, DIMS: tl.constexpr, DIM: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cos, sin = angle(row, positions, turns, divisors, MAGNITUDE, DIVIDED, DIMS, WIDE)
    block = tl.program_id(1)
    if block < tl.cdiv(QUERIES, TALL):
        at = row * QUERIES * DIM
        turn(q + at, q_out + at, block * TALL, cos, sin, ADJACENT, DIMS, DIM, QUERIES, WIDE, TALL)
    else:
        at = row * KEYS * DIM
        first = (block - tl.cdiv(QUERIES, TALL)) * TALL
        turn(k + at, k_out + at, first, cos, sin, ADJACENT, DIMS, DIM, KEYS, WIDE, TALL)


@triton.jit
def angle(
    row, positions, turns, divisors,
    MAGNITUDE: tl.constexpr, DIVIDED: tl.constexpr, DIMS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Cosine and sine of a row's pairs; whole turns are taken off in float64, so that far positions lose nothing."""
    pair = tl.arange(0, WIDE)
    there = pair < DIMS // 2
    each = tl.load(turns + pair, mask=there, other=0.0)
    if DIVIDED:
        each = each / tl.load(divisors + pair, mask=there, other=1.0).to(tl.float64)
    count = tl.load(positions + row).to(tl.float64) * each
    radians = ((count - tl.floor(count + 0.5)) * 6.283185307179586).to(tl.float32)
    return tl.cos(radians) * MAGNITUDE, tl.sin(radians) * MAGNITUDE


@triton.jit
def turn(
    x, y, first, cos, sin,
    ADJACENT: tl.constexpr, DIMS: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, WIDE: tl.constexpr,
    TALL: tl.constexpr,
):  # fmt: skip
    """Turns `TALL` heads from `first` on of the row at x into the row at y, which may be the same memory."""
    head, pair = first + tl.arange(0, TALL), tl.arange(0, WIDE)
    there = (head < HEADS)[:, None]
    inside = there & (pair < DIMS // 2)[None, :]
    # Both of a pair, so that neighbours are loaded together.
    side = tl.arange(0, 2)
    pairs = (pair[:, None] * 2 + side[None, :]) if ADJACENT else (pair[:, None] + side[None, :] * (DIMS // 2))
    at = (head * DIM)[:, None, None] + pairs[None, :, :]
    a, b = tl.split(tl.load(x + at, mask=inside[:, :, None], other=0.0).to(tl.float32))
    turned = tl.join(a * cos[None, :] - b * sin[None, :], a * sin[None, :] + b * cos[None, :])
    tl.store(y + at, turned.to(y.dtype.element_ty), mask=inside[:, :, None])
    if DIMS < DIM:
        passed = there & (pair < DIM - DIMS)[None, :]
        rest = head[:, None] * DIM + DIMS + pair[None, :]
        tl.store(y + rest, tl.load(x + rest, mask=passed, other=0.0).to(y.dtype.element_ty), mask=passed)
