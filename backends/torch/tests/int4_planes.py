"""What torch's int4 kernel multiplies, in plain numpy: w = (q - 8) * scale + offset of blocks of 32 columns."""

from __future__ import annotations

import numpy as np


def planes(format, blocks):
    """Integers [n, columns], and float32 scales and offsets [columns / 32, n, 2], of blocks [n, bytes].

    Q8_0's q = 16 h + l is two matrices beside each other, h + 8 by 16 times the scale, and l by the scale itself.
    """
    n = len(blocks)
    split = blocks.reshape(n, -1, {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[format])
    header = 4 if format == "Q4_1" else 2
    numbers, stored = split[..., :header].copy().view(np.float16).astype(np.float32), split[..., header:]
    scale, zero = numbers[..., 0], np.zeros_like(numbers[..., 0])
    if format == "Q8_0":
        q = stored.view(np.int8).astype(np.int32).reshape(n, -1)
        integers = np.concatenate([q // 16 + 8, q % 16], axis=1)
        scales = np.concatenate([16 * scale, scale], axis=1)
        offsets = np.concatenate([zero, 8 * scale], axis=1)
    else:
        integers = np.concatenate([stored % 16, stored // 16], axis=2).astype(np.int32).reshape(n, -1)
        scales, offsets = scale, numbers[..., 1] + 8 * scale if format == "Q4_1" else zero
    return integers, np.stack([scales.T, offsets.T], axis=2)


def of_groups(data, scales, zeros, group):
    """Integers [n, k], and float32 scales and offsets [k / group, n, 2], of 4-bit groups with float32 scales."""
    integers = np.stack([data % 16, data // 16], axis=2).astype(np.int32).reshape(len(data), -1)
    times = integers.shape[1] // group // scales.shape[1]
    scales, zeros = (part.astype(np.float32).repeat(times, axis=1) for part in (scales, zeros))
    return integers, np.stack([scales.T, (scales * (8 - zeros)).T], axis=2)
