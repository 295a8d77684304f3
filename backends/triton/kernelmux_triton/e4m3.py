"""e4m3 numbers as bfloat16 without arithmetic, two at a time: for kernels that multiply them by wider ones.

A load of bytes cannot be turned over for the matrix units on its way through shared memory, one of pairs of bytes can.
So matrices of e4m3 are read as pairs of neighbours, and their first and second columns are multiplied by themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

DOWN = tl.constexpr(2.0**-120)
"""What `halves` are times too small: bfloat16 counts its exponents from -127, e4m3 from -7."""
UP = tl.constexpr(2.0**64)
"""What to multiply their partners by, which may be up to 2^63: products of numbers so small would lose bits."""
BACK = tl.constexpr(2.0**56)
"""What to multiply the sums by: 1 / (UP DOWN)."""


@triton.jit
def halves(pairs, ASSEMBLED: tl.constexpr):
    """Of pairs of e4m3 (int16) the first and the second ones, bfloat16, times DOWN; NaN is taken for 480.

    Sign, exponent and mantissa are moved to where bfloat16 has them. ASSEMBLED where the target is a GPU.
    """
    if ASSEMBLED:
        # Two pairs at once: the compiler would take them apart.
        first, second = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, moved;
            prmt.b32 low, $2, 0, 0x2404;
            shr.b32 moved, low, 4;
            and.b32 moved, moved, 0x07f007f0;
            lop3.b32 $0, low, 0x80008000, moved, 0xea;
            shr.b32 moved, $2, 4;
            and.b32 moved, moved, 0x07f007f0;
            lop3.b32 $1, $2, 0x80008000, moved, 0xea;
            }
            """,
            "=&r,=&r,r",
            [pairs],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        low = (pairs << 8).to(tl.int16)
        first = ((low & -0x8000) | ((low >> 4) & 0x07F0)).to(tl.int16).to(tl.bfloat16, bitcast=True)
        second = ((pairs & -0x8000) | ((pairs >> 4) & 0x07F0)).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return first, second
