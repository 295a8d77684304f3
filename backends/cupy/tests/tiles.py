"""Tiles as `cuda/formats.cuh` reads them, in plain numpy: made from a file's blocks, byte by byte as it states them."""

from __future__ import annotations

import numpy as np

LANES = 32
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6}
SIGNED = ("Q4_0", "Q5_0", "Q6_K")


def tiles(format, blocks, k):
    """The tiles [groups of 32 rows, tiles of a row, bytes] of blocks [n, bytes]; rows that fill a group are zeros."""
    n = len(blocks)
    q, *scales = FILE[format](blocks.reshape(n, -1, BLOCK_BYTES[format]))
    q = q.reshape(n, k // 32, 32)
    if format in SIGNED:
        # In two's complement, around zero.
        q = (q - 2 ** (BITS[format] - 1)) % 2 ** BITS[format]
    count = next(blocks for blocks in (8, 2, 1) if k // 32 % blocks == 0)
    fields = [field.reshape(n, k // 32 // count, -1) for field in (*integers(q, BITS[format]), *scales)]
    return np.concatenate([spread(field) for field in fields], axis=2)


def spread(field):
    """A field of a tile [vectors][32 lanes][16 bytes, or as many as a lane has], of lanes' bytes [n, tiles, bytes]."""
    n, count, size = field.shape
    width = min(16, size)
    made = np.zeros((-(-n // LANES), count, LANES * size), np.uint8)
    for row in range(n):
        for at in range(0, size, width):
            place = at * LANES + row % LANES * width
            made[row // LANES, :, place : place + width] = field[row, :, at : at + width]
    return made


def integers(q, bits):
    """Of integers [n, blocks, 32] the bytes of each block: nibbles, and the bits above these."""
    if bits == 8:
        return [q.astype(np.uint8)]
    nibbles = np.zeros((*q.shape[:2], 16), np.uint8)
    upper = np.zeros((*q.shape[:2], {4: 0, 5: 4, 6: 8}[bits]), np.uint8)
    for column in range(32):
        word, byte = divmod(column, 4)
        low, high = q[..., column] % 16, q[..., column] // 16
        # Words 0 to 3 are low nibbles, the others the high ones.
        nibbles[..., column % 16] |= (low << 4 * (column // 16)).astype(np.uint8)
        if bits == 5:
            upper[..., byte] |= (high << word).astype(np.uint8)
        if bits == 6:
            upper[..., 4 * (column // 16) + byte] |= (high << 2 * (word % 4)).astype(np.uint8)
    return [nibbles, upper] if bits > 4 else [nibbles]


# The file's blocks [n, blocks, bytes] (ggml-common.h in llama.cpp): integers [n, columns], fields of scales.


def bits_of(packed, width):
    """The fields of so many bits of bytes [..., w], lowest first: [..., 8 / width, w]."""
    return np.stack([packed >> shift & 2**width - 1 for shift in range(0, 8, width)], axis=-2).astype(int)


def flat(parts):
    return np.concatenate(parts, axis=-1)


def simple(header, upper):
    def split(blocks):
        low = bits_of(blocks[..., -16:], 4).reshape(*blocks.shape[:2], 32)
        if upper:
            fifth = np.unpackbits(blocks[..., header : header + 4], axis=-1, bitorder="little")
            low += 16 * fifth.astype(int)
        return low, blocks[..., :header]

    return split


def q8_0(blocks):
    return blocks[..., 2:], blocks[..., :2]


def q4_k(blocks):
    runs = [bits_of(blocks[..., 16 + 32 * i : 48 + 32 * i], 4) for i in range(4)]
    return np.concatenate(runs, axis=-2), blocks[..., :16]


def q5_k(blocks):
    low, scales = q4_k(flat([blocks[..., :16], blocks[..., 48:]]))
    return low + 16 * bits_of(blocks[..., 16:48], 1), scales


def q6_k(blocks):
    halves = []
    for half in range(2):
        low = bits_of(blocks[..., 64 * half : 64 * half + 64], 4).reshape(*blocks.shape[:2], 128)
        high = bits_of(blocks[..., 128 + 32 * half : 160 + 32 * half], 2).reshape(*blocks.shape[:2], 128)
        halves.append(low + 16 * high)
    return flat(halves), blocks[..., 192:208], blocks[..., 208:]


FILE = {
    **{"Q4_0": simple(2, False), "Q4_1": simple(4, False), "Q5_0": simple(2, True), "Q5_1": simple(4, True)},
    **{"Q8_0": q8_0, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k},
}
