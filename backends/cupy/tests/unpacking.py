"""The inverse of `kernelmux_cupy.pack`: a packed weight's blocks, as the file has them."""

from __future__ import annotations

from functools import partial, reduce

import torch

from kernelmux.graph.formats import lookup
from kernelmux_cupy.pack import ROWS, TILED, tile_blocks


def unpack(format, packed, n, k):
    """The blocks [n, bytes] that were packed."""
    tiled, blocks = TILED[format], tile_blocks(k)
    groups, per_tile, _ = packed.shape
    sizes = tiled.fields(format, blocks)
    fields = []
    for field, size in zip(packed.split([ROWS * size for size in sizes], dim=-1), sizes, strict=True):
        width = min(16, size)
        vectors = field.view(groups, per_tile, size // width, ROWS, width).permute(0, 3, 1, 2, 4)
        fields.append(vectors.reshape(groups * ROWS, per_tile, size)[:n])
    planes = 2 if tiled.bits in (5, 6) else 1
    q = _integers([field.reshape(n, k // 32, -1) for field in fields[:planes]], tiled.bits) ^ tiled.flip
    whole = k // lookup(format).block
    scales = [field.reshape(n, whole, -1) for field in fields[planes:]]
    return JOINS[format](q.reshape(n, whole, -1), scales).reshape(n, -1)


def _integers(planes, bits):
    """The inverse of `pack._planes`."""
    if bits == 8:
        return planes[0]
    low = torch.cat([planes[0] & 15, planes[0] >> 4], dim=-1)
    if bits == 4:
        return low
    size, words = bits - 4, 8 // (bits - 4)
    upper = planes[1].view(*low.shape[:-1], 8 // words, 4)
    parts = torch.stack([upper >> size * i & (2**size - 1) for i in range(words)], dim=-2)
    return low | parts.reshape(low.shape) << 4


def _or(parts):
    return reduce(torch.bitwise_or, parts)


def _join_simple(upper, q, scales):
    low = q & 15
    parts = [scales[0], low[..., :16] | low[..., 16:] << 4]
    if upper:
        bits = (q >> 4).view(*q.shape[:-1], 4, 8)
        parts.insert(1, _or([bits[..., i] << i for i in range(8)]))
    return torch.cat(parts, dim=-1)


def _join_q8_0(q, scales):
    return torch.cat([scales[0], q], dim=-1)


def _join_q4_k(q, scales):
    pairs = (q & 15).view(*q.shape[:-1], 4, 2, 32)
    return torch.cat([scales[0], (pairs[..., 0, :] | pairs[..., 1, :] << 4).flatten(-2)], dim=-1)


def _join_q5_k(q, scales):
    bits = (q >> 4).view(*q.shape[:-1], 8, 32)
    upper = _or([bits[..., b, :] << b for b in range(8)])
    rest = _join_q4_k(q, scales)
    return torch.cat([rest[..., :16], upper, rest[..., 16:]], dim=-1)


def _join_q6_k(q, scales):
    halves = q.view(*q.shape[:-1], 2, 2, 64)
    low = halves & 15
    nibbles = (low[..., 0, :] | low[..., 1, :] << 4).flatten(-2)
    quarters = (q >> 4).view(*q.shape[:-1], 2, 4, 32)
    upper = _or([quarters[..., i, :] << 2 * i for i in range(4)]).flatten(-2)
    return torch.cat([nibbles, upper, *scales], dim=-1)


JOINS = {
    **dict.fromkeys(("Q4_0", "Q4_1"), partial(_join_simple, False)),
    **dict.fromkeys(("Q5_0", "Q5_1"), partial(_join_simple, True)),
    "Q8_0": _join_q8_0,
    "Q4_K": _join_q4_k,
    "Q5_K": _join_q5_k,
    "Q6_K": _join_q6_k,
}
"""Of each format the inverse of its `split`."""
