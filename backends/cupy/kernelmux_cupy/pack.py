"""Quantised weights in tiles: 32 rows by a few blocks of 32 columns, laid out for `cuda/formats.cuh`.

Enters: a GGUF weight's blocks [n, bytes]. Leaves: bytes [groups of 32 rows, tiles, bytes of a tile], as many as the
file has but for rows that fill the last group. Works where the blocks lie, CPU or CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from kernelmux.contract.device import Device
from kernelmux.contract.weights import row_ranges
from kernelmux.graph.formats import Weight, lookup

ROWS = 32
"""Rows of a tile: one a lane."""

Split = Callable[[Tensor], tuple[Tensor, list[Tensor]]]


@dataclass(frozen=True)
class Tiled:
    """How a format's blocks come apart: `split` gives integers, `upper` says how many bits lie beyond the first four.

    `split` takes blocks [..., bytes] of one GGUF block each to integers [..., columns] (uint8) and fields of scales.
    `flip` is the integers' sign bit where there is no minimum: flipped, they are in two's
    complement around zero.
    """

    bits: int
    flip: int
    split: Split
    scales: Sequence[int]
    """Bytes of each field of scales, for one GGUF block."""

    def fields(self, format: str, blocks: int) -> list[int]:
        """Bytes a lane of a tile of so many blocks of 32 columns: integers, upper bits, scales."""
        whole = 32 * blocks // lookup(format).block
        upper = {5: 4, 6: 8}.get(self.bits, 0)
        integers = [blocks * (32 if self.bits == 8 else 16), *([blocks * upper] if upper else [])]
        return [*integers, *(size * whole for size in self.scales)]


def tile_blocks(k: int) -> int:
    """Blocks of 32 columns in a tile, where rows have k columns: 8, or as many as divide them."""
    return next(blocks for blocks in (8, 2, 1) if k % (32 * blocks) == 0)


def lane_bytes(format: str, k: int) -> int:
    """Bytes of a tile for each of its rows."""
    return sum(TILED[format].fields(format, tile_blocks(k)))


def packed_bytes(format: str, n: int, k: int) -> int:
    """Bytes of a packed weight [n, k]."""
    return -(-n // ROWS) * ROWS * (k // (32 * tile_blocks(k))) * lane_bytes(format, k)


def pack(weight: Weight, device: Device) -> Tensor:
    """A weight [n, k] on the device, packed some rows at a time: uint8 [groups, tiles, bytes]."""
    n, k = weight.shape
    tiles, size = k // (32 * tile_blocks(k)), ROWS * lane_bytes(weight.format, k)
    whole = torch.empty(-(-n // ROWS), tiles, size, dtype=torch.uint8, device=device.torch)
    for rows in row_ranges(n, k, ROWS):
        part = weight.planes[0][rows].to(device.torch)
        whole[rows.start // ROWS : -(-rows.stop // ROWS)] = pack_blocks(weight.format, part, k)
    return whole


def pack_blocks(format: str, blocks: Tensor, k: int) -> Tensor:
    """Blocks [n, bytes] in tiles."""
    tiled, n, size = TILED[format], len(blocks), lookup(format).block
    q, scales = tiled.split(blocks.view(n, k // size, -1))
    per_tile = k // (32 * tile_blocks(k))
    fields = [*_planes(q.reshape(n, k // 32, 32) ^ tiled.flip, tiled.bits), *scales]
    padding = -n % ROWS
    laid = []
    for field in fields:
        rows = torch.nn.functional.pad(field.reshape(n, per_tile, -1), (0, 0, 0, 0, 0, padding))
        width = min(16, rows.shape[-1])
        vectors = rows.view(-1, ROWS, per_tile, rows.shape[-1] // width, width)
        laid.append(vectors.permute(0, 2, 3, 1, 4).flatten(2))
    return torch.cat(laid, dim=-1)


def _planes(q: Tensor, bits: int) -> list[Tensor]:
    """Integers [..., 32] as 16 bytes of nibbles, columns 0 to 15 in the low ones, and the bits above those.

    A word of four columns gives upper bits to its four bytes: word i has bit i, or bits 2i and 2i + 1 of its half.
    """
    if bits == 8:
        return [q]
    low = q & 15
    nibbles = low[..., :16] | low[..., 16:] << 4
    if bits == 4:
        return [nibbles]
    size, words = bits - 4, 8 // (bits - 4)
    upper = (q >> 4).view(*q.shape[:-1], 8 // words, words, 4)
    parts = [upper[..., i, :] << size * i for i in range(words)]
    return [nibbles, reduce(torch.bitwise_or, parts).flatten(-2)]


# GGUF's blocks (ggml's quantisation formats): scales, upper bits, nibbles of a block's first and second half..


def _simple(scale: int, upper: bool) -> Split:
    """Of Q4_0 to Q5_1: `scale` bytes, four bytes of fifth bits where there are any, 16 bytes of nibbles."""

    def split(blocks: Tensor) -> tuple[Tensor, list[Tensor]]:
        scales, *rest = blocks.split([scale, *([4] if upper else []), 16], dim=-1)
        q = torch.cat([rest[-1] & 15, rest[-1] >> 4], dim=-1)
        if upper:
            shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
            q = q | (rest[0].unsqueeze(-1) >> shifts & 1).flatten(-2) << 4
        return q, [scales]

    return split


def _split_q8_0(blocks: Tensor) -> tuple[Tensor, list[Tensor]]:
    return blocks[..., 2:], [blocks[..., :2]]


def _split_q4_k(blocks: Tensor) -> tuple[Tensor, list[Tensor]]:
    """16 bytes of scales; four times 32 bytes, whose low nibbles are one block and the high ones the next."""
    nibbles = blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 1, 32)
    return torch.cat([nibbles & 15, nibbles >> 4], dim=-2).flatten(-3), [blocks[..., :16]]


def _split_q5_k(blocks: Tensor) -> tuple[Tensor, list[Tensor]]:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit b of byte j is column j of block b."""
    low, scales = _split_q4_k(torch.cat([blocks[..., :16], blocks[..., 48:]], dim=-1))
    upper = torch.stack([blocks[..., 16:48] >> b & 1 for b in range(8)], dim=-2)
    return low | upper.flatten(-2) << 4, scales


def _split_q6_k(blocks: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Of each half of 128 columns: 64 bytes of nibbles (low ones columns 0 to 63), 32 bytes of pairs of bits."""
    low, upper, scales, last = blocks.split([128, 64, 16, 2], dim=-1)
    low = low.reshape(*blocks.shape[:-1], 2, 1, 64)
    q = torch.cat([low & 15, low >> 4], dim=-2).flatten(-2)
    upper = upper.reshape(*blocks.shape[:-1], 2, 32)
    pairs = torch.cat([upper >> 2 * i & 3 for i in range(4)], dim=-1)
    return (q | pairs << 4).flatten(-2), [scales, last]


TILED = {
    "Q4_0": Tiled(4, 8, _simple(2, False), (2,)),
    "Q4_1": Tiled(4, 0, _simple(4, False), (4,)),
    "Q5_0": Tiled(5, 16, _simple(2, True), (2,)),
    "Q5_1": Tiled(5, 0, _simple(4, True), (4,)),
    "Q8_0": Tiled(8, 0, _split_q8_0, (2,)),
    "Q4_K": Tiled(4, 0, _split_q4_k, (16,)),
    "Q5_K": Tiled(5, 0, _split_q5_k, (16,)),
    "Q6_K": Tiled(6, 32, _split_q6_k, (16, 2)),
}
"""The formats that can be packed."""
