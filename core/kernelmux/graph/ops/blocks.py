"""Random valid blocks of quantised formats, GGUF's and 4-bit groups: weights of cases, and of models without a file.

Enters: a format and a shape. Leaves: the bytes of its blocks, with scales of every kind that quantisers make.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelmux.graph.formats import Value, lookup, torch_dtype

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Scales:
    """Where a block keeps its float16 numbers, as byte offsets (ggml's quantisation formats); other bytes are free."""

    scale: int
    minimum: int | None = None
    middle: float = 0.0
    """The minimum, over the scale, that centres the values of random bytes. In a real block it is about that large:
    smaller, it would be lost beside the error of 8-bit activations."""


_BLOCKS: Mapping[str, _Scales] = {
    "Q4_0": _Scales(0),
    "Q4_1": _Scales(0, 2, -7.5),
    "Q5_0": _Scales(0),
    "Q5_1": _Scales(0, 2, -15.5),
    "Q8_0": _Scales(0),
    "Q2_K": _Scales(80, 82, 1.5),
    "Q3_K": _Scales(108),
    "Q4_K": _Scales(0, 2, 7.5),
    "Q5_K": _Scales(0, 2, 15.5),
    "Q6_K": _Scales(208),
}

TINY = 3e-5
"""Makes every scale a float16 without exponent bits (below 6.1e-5), as a decoder that only shifts loses them."""


def random_blocks(
    format: str,
    shape: tuple[int, ...],
    generator: torch.Generator,
    largest: float = 0.1,
    centred: bool = False,
    tiny: bool = False,
) -> torch.Tensor:
    """Random valid blocks of a GGUF format as one uint8 plane, on the generator's device.

    Scales are a tenth of `largest` to that, of either sign, as ggml's quantisers make both. Minima are drawn likewise,
    as large as half the integers' range, or, where `centred`, follow from the scales so that the values' mean is zero.
    `tiny`: all are smaller by `TINY`, and one in four is zero.
    """
    import torch

    (plane,) = lookup(format).planes
    device, at = generator.device, _BLOCKS[format]
    blocks = torch.randint(256, plane.shape(shape), generator=generator, dtype=torch.uint8, device=device)
    blocks = blocks.view(*blocks.shape[:-1], -1, plane.items)

    def draw(size: float) -> torch.Tensor:
        numbers = size * largest * (0.1 + 0.9 * torch.rand(blocks.shape[:-1], generator=generator, device=device))
        numbers *= torch.randint(2, numbers.shape, generator=generator, device=device) * 2 - 1
        if tiny:
            numbers *= TINY * (torch.randint(4, numbers.shape, generator=generator, device=device) > 0)
        return numbers

    def write(offset: int, numbers: torch.Tensor) -> None:
        blocks[..., offset : offset + 2] = numbers.to(torch.float16).unsqueeze(-1).view(torch.uint8)

    scales = draw(1.0)
    write(at.scale, scales)
    if at.minimum is not None:
        write(at.minimum, at.middle * scales if centred else draw(abs(at.middle)))
    return blocks.flatten(-2)


def random_groups(
    format: str, shape: tuple[int, ...], generator: torch.Generator, largest: float = 0.1, centred: bool = False
) -> tuple[torch.Tensor, ...]:
    """Random valid planes of a format of 4-bit groups, on the generator's device.

    Scales are a tenth of `largest` to that; zero points are any that files have, 0 to 16, or, where `centred`, 7 and 8.
    """
    import torch

    data, scales, zeros = lookup(format).planes
    device = generator.device
    steps = largest * (0.1 + 0.9 * torch.rand(scales.shape(shape), generator=generator, device=device))
    least, most = (7, 8) if centred else (0, 16)
    middle = torch.randint(least, most + 1, zeros.shape(shape), generator=generator, dtype=torch.uint8, device=device)
    nibbles = torch.randint(256, data.shape(shape), generator=generator, dtype=torch.uint8, device=device)
    return nibbles, steps.to(torch_dtype(scales.dtype)), middle


@dataclass(frozen=True)
class TinyBlocks:
    """Draws blocks for a weight whose scales are the smallest that float16 holds, or zero."""

    weight: Value

    def __call__(self, generator: torch.Generator) -> torch.Tensor:
        return random_blocks(self.weight.format, self.weight.extents, generator, tiny=True)
