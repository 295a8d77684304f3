"""How Triton kernels that hold a whole row write it: in a float format, or in fp8_row with the scale that it needs."""

from __future__ import annotations

import triton
import triton.language as tl

FLOATS = ("f32", "bf16", "f16")
WRITTEN = (*FLOATS, "fp8_row")
"""The formats that `store_row` writes."""
TINY = tl.constexpr(2.0**-126)
"""What a scale is at least when values are divided by it."""
LARGEST = tl.constexpr(448.0)
"""The largest magnitude of e4m3."""


def warps(elements: int) -> int:
    """16 elements a thread: the one row of a decode step is read with few loads one after another."""
    return min(16, max(1, elements // 512))


@triton.jit
def store_row(y, scales, row, values, column, COLUMNS: tl.constexpr, SCALED: tl.constexpr):
    """`values` beyond COLUMNS must be zeros."""
    if SCALED:
        scale = tl.div_rn(tl.max(tl.abs(values), axis=0), LARGEST)
        tl.store(scales + row, scale)
        values *= tl.div_rn(1.0, tl.maximum(scale, TINY))
    tl.store(y + row * COLUMNS + column, values.to(y.dtype.element_ty), mask=column < COLUMNS)
