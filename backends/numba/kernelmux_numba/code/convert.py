"""Activations in eight bits: per 32 columns a scale, and the sum of the 32 dequantised values."""

from __future__ import annotations

from collections.abc import Callable

from numba import float32, int32, njit

from kernelmux_numba.code.memory import floats, small, word
from kernelmux_numba.target import Target


def half_sums(target: Target) -> Callable[[int, int], None]:
    """The sums of sixteen columns each: of the integers, by the scale of their block."""

    def run(words: int, part: int) -> None:
        x, scales, sums = small(word(words, 0)), floats(word(words, 1)), floats(word(words, 2))
        first = part * word(words, 4)
        for block in range(first, min(first + word(words, 4), word(words, 3))):
            for half in range(2):
                total = int32(0)
                for column in range(16):
                    total += int32(x[32 * block + 16 * half + column])
                sums[2 * block + half] = float32(total) * scales[block]

    return run


@njit
def quantise(values: object, qs: object, scales: object, sums: object, block: int) -> None:
    """A block of 32 values (pointers, from the start of the rows) in eight bits."""
    largest = float32(0)
    for column in range(32):
        largest = max(largest, abs(values[column]))
    scale = largest / float32(127)
    inverse = float32(127) / largest if largest > float32(0) else float32(0)
    total = int32(0)
    for column in range(32):
        rounded = int32(round(values[column] * inverse))
        qs[32 * block + column] = rounded
        total += rounded
    scales[block] = scale
    sums[block] = float32(total) * scale
