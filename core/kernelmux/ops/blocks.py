"""Random valid blocks of GGUF's quantised formats: the weights of cases.

Enters: a format and a shape. Leaves: the bytes of its blocks, with scales of every kind that ggml's quantisers make.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kernelmux.formats import Value, lookup
from kernelmux.ops.op import Draw

if TYPE_CHECKING:
    import torch

# Where a block keeps its float16 scales and minimum: byte offsets in the block structs of ggml's quantisation formats,
# and how large each is. In a real block the minimum is half the integers' range: smaller, it would be lost beside the
# error of 8-bit activations. All other bytes are integers, of which any value is valid.
_SCALES_AT: Mapping[str, Mapping[int, float]] = {
    "Q4_0": {0: 1},
    "Q4_1": {0: 1, 2: 8},
    "Q5_0": {0: 1},
    "Q5_1": {0: 1, 2: 16},
    "Q8_0": {0: 1},
    "Q2_K": {80: 1, 82: 2},
    "Q3_K": {108: 1},
    "Q4_K": {0: 1, 2: 8},
    "Q5_K": {0: 1, 2: 16},
    "Q6_K": {208: 1},
}

TINY = 3e-5
"""Makes every scale a float16 without exponent bits (below 6.1e-5), as a decoder that only shifts loses them."""


def random_blocks(format: str, shape: tuple[int, ...], generator: torch.Generator, tiny: bool = False) -> torch.Tensor:
    """Random valid blocks of a GGUF format, as uint8 planes.

    Scales are 0.01 to 0.1, of either sign, as ggml's quantisers make both; minima as large as half the integers' range.
    `tiny`: they are smaller by `TINY`, and one in four is zero.
    """
    import torch

    (plane,) = lookup(format).planes
    blocks = torch.randint(256, plane.shape(shape), generator=generator, dtype=torch.uint8)
    blocks = blocks.view(*blocks.shape[:-1], -1, plane.items)
    for offset, size in _SCALES_AT[format].items():
        scales = size * (0.01 + 0.09 * torch.rand(blocks.shape[:-1], generator=generator))
        scales *= torch.randint(2, scales.shape, generator=generator) * 2 - 1
        if tiny:
            scales *= TINY * (torch.randint(4, scales.shape, generator=generator) > 0)
        blocks[..., offset : offset + 2] = scales.to(torch.float16).unsqueeze(-1).view(torch.uint8)
    return blocks.flatten(-2)


def tiny_blocks(weight: Value) -> Draw:
    """Blocks for a weight whose scales are the smallest that float16 holds, or zero."""
    return lambda generator: random_blocks(weight.format, weight.extents, generator, tiny=True)
