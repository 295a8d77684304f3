"""Planes as few_rows_kernels.py states them, in plain numpy: made from a file's blocks, or 4-bit groups."""

from __future__ import annotations

import numpy as np

BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34, "Q4_K": 144}


def planes(format, blocks):
    """The planes of blocks [n, bytes]: uint8 or int8 integers, scales, of Q4_K pairs."""
    n = len(blocks)
    split = blocks.reshape(n, -1, BLOCK_BYTES[format])
    if format == "Q4_K":
        return _q4_k(split)
    header = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2}[format]
    scales, q = split[..., :header].copy(), split[..., header:].copy()
    # Byte i of a block has columns i and 16 + i in the file too.
    integers = q.reshape(n, -1).view(np.int8 if format == "Q8_0" else np.uint8)
    return integers, scales.view(np.int32 if format == "Q4_1" else np.float16).reshape(n, -1)


def _q4_k(blocks):
    n, count, _ = blocks.shape
    six, packed = blocks[..., 4:16], blocks[..., 16:]
    q = np.zeros((n, count, 256), np.uint8)
    factors = np.zeros((n, count, 8, 2), np.uint8)
    for block in range(8):
        # Two blocks share 32 bytes: the even one has the low nibbles.
        shared = packed[..., 32 * (block // 2) : 32 * (block // 2) + 32]
        q[..., 32 * block : 32 * block + 32] = shared >> 4 if block % 2 else shared & 15
        # Six bits each: of the last four blocks the upper two lie in the first four's bytes.
        if block < 4:
            factors[..., block, 0], factors[..., block, 1] = six[..., block] & 63, six[..., block + 4] & 63
        else:
            low = six[..., block + 4]
            factors[..., block, 0] = low & 15 | six[..., block - 4] >> 6 << 4
            factors[..., block, 1] = low >> 4 | six[..., block] >> 6 << 4
    halves = q.reshape(n, -1, 2, 16)
    nibbles = halves[:, :, 0] | halves[:, :, 1] << 4
    pairs = blocks[..., :4].copy().view(np.int32)
    return nibbles.reshape(n, -1), factors.view(np.int16).reshape(n, -1), pairs.reshape(n, -1)


def of_groups(data, scales, zeros):
    """The planes of 4-bit groups, bytes [n, k/2] of neighbours: in 16 bytes, of 32 columns, those 16 apart."""
    low, high = data & 15, data >> 4
    columns = np.stack([low, high], axis=-1).reshape(len(data), -1, 2, 16)
    return (columns[:, :, 0] | columns[:, :, 1] << 4).reshape(len(data), -1), scales, zeros
