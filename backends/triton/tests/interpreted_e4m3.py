"""e4m3 numbers turned into bfloat16 by their bits, interpreted on CPU tensors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernelmux_triton.e4m3 import BACK, DOWN, UP, halves


@triton.jit
def _halves_of(pairs, first, second):
    at = tl.arange(0, 256)
    low, high = halves(tl.load(pairs + at), False)
    tl.store(first + at, low)
    tl.store(second + at, high)


def test_every_pair_of_numbers_is_exact():
    numbers = torch.arange(256, dtype=torch.uint8)
    # NaN, which a cache does not hold: its scales have it.
    numbers = numbers[numbers & 0x7F != 0x7F]
    pairs = torch.stack([numbers, numbers.flip(0)], dim=1)
    padded = torch.cat([pairs, pairs[:2]])
    first, second = (torch.empty(256, dtype=torch.bfloat16) for _ in range(2))
    _halves_of[(1,)](padded.view(torch.int16).flatten(), first, second)
    wanted = padded.view(torch.float8_e4m3fn).double()
    for found, column in ((first, wanted[:, 0]), (second, wanted[:, 1])):
        assert torch.equal(found.double(), column * 2.0**-120)
        assert torch.equal(found.signbit(), column.signbit())


def test_what_is_multiplied_comes_back():
    assert DOWN.value * UP.value * BACK.value == 1
