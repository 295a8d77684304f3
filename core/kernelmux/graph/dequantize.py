"""GGUF's blocks as float32: taken apart by torch, wherever they lie, to the bit as the gguf package does.

Enters: blocks of one type, as bytes [blocks, size]. Leaves: float32 [blocks, columns]. The layouts are those of
ggml-common.h in llama.cpp; products and sums are rounded one by one, as there. dequantize_iq.py has the types that are
looked up in large tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kernelmux.graph.bit_fields import fields, half, in_order
from kernelmux.graph.dequantize_iq import UNPACK_IQ

if TYPE_CHECKING:
    import torch

DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the values of e2m1 (OCP Microscaling Formats 1.0, table 5): times half the scale, which is always finite."""
UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The values of four bits in IQ4_NL and IQ4_XS."""


def dequantize_blocks(name: str, blocks: torch.Tensor) -> torch.Tensor:
    """float32 [blocks, columns] of blocks [blocks, bytes] of one of GGUF's types, on their device."""
    return UNPACK[name](blocks)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return fields(blocks[:, 2:], 4).flatten(1).float().sub_(8).mul_(half(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return fields(blocks[:, 4:], 4).flatten(1).float().mul_(half(blocks, 0)).add_(half(blocks, 2))


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    levels = fields(blocks[:, 6:], 4).flatten(1) + 16 * in_order(blocks[:, 2:6], 1)
    return levels.float().sub_(16).mul_(half(blocks, 0))


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    levels = fields(blocks[:, 8:], 4).flatten(1) + 16 * in_order(blocks[:, 4:8], 1)
    return levels.float().mul_(half(blocks, 0)).add_(half(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    import torch

    return blocks[:, 2:].view(torch.int8).float().mul_(half(blocks, 0))


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    """Sixteen runs of sixteen, each with a scale and a minimum of four bits."""
    scales, packed = blocks[:, :16], blocks[:, 16:80].view(-1, 2, 32)
    steps = half(blocks, 80) * (scales & 15).float()
    least = half(blocks, 82) * (scales >> 4).float()
    levels = fields(packed, 2).reshape(len(blocks), 16, 16).float()
    return levels.mul_(steps.unsqueeze(2)).sub_(least.unsqueeze(2)).flatten(1)


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    """Sixteen runs of sixteen, each with a scale of six bits; a high bit that is not set subtracts four."""
    high, packed, scales = blocks[:, :32], blocks[:, 32:96].view(-1, 2, 32), blocks[:, 96:108]
    six = fields(scales[:, :8], 4).flatten(1) + 16 * fields(scales[:, 8:], 2).flatten(1)
    steps = half(blocks, 108) * six.float().sub_(32)
    levels = fields(packed, 2).reshape(len(blocks), 16, 16).float()
    levels.sub_(4 * (1 - fields(high, 1)).reshape(len(blocks), 16, 16))
    return levels.mul_(steps.unsqueeze(2)).flatten(1)


def _six_bits(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of six bits, in twelve bytes: two bits of the last four lie in the first."""
    import torch

    first, second, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([first & 63, (low & 15) | (first >> 6 << 4)], dim=1)
    minima = torch.cat([second & 63, (low >> 4) | (second >> 6 << 4)], dim=1)
    return scales.float(), minima.float()


def _runs_of_32(blocks: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Levels [blocks, 8, 32] by the scales and minima of Q4_K and Q5_K."""
    scales, minima = _six_bits(blocks[:, 4:16])
    steps, least = half(blocks, 0) * scales, half(blocks, 2) * minima
    return levels.float().mul_(steps.unsqueeze(2)).sub_(least.unsqueeze(2)).flatten(1)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    return _runs_of_32(blocks, fields(blocks[:, 16:].view(-1, 4, 32), 4).flatten(1, 2))


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    low = fields(blocks[:, 48:].view(-1, 4, 32), 4).flatten(1, 2)
    return _runs_of_32(blocks, low + 16 * fields(blocks[:, 16:48], 1))


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    """Sixteen runs of sixteen, each with a signed scale of eight bits."""
    import torch

    low = fields(blocks[:, :128].view(-1, 2, 64), 4).reshape(len(blocks), 8, 32)
    high = fields(blocks[:, 128:192].view(-1, 2, 32), 2).reshape(len(blocks), 8, 32)
    steps = half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    levels = (low + 16 * high).float().sub_(32).reshape(len(blocks), 16, 16)
    return levels.mul_(steps.unsqueeze(2)).flatten(1)


def _tq1_0(blocks: torch.Tensor) -> torch.Tensor:
    """Five ternary digits a byte, a fraction of 256: multiplied by 3 the first comes off the top."""
    import torch

    parts = []
    for packed, digits in ((blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4)):
        powers = torch.tensor([3**digit for digit in range(digits)], dtype=torch.uint8, device=blocks.device)
        parts.append((packed.unsqueeze(1) * powers.unsqueeze(1)).flatten(1))
    levels = (torch.cat(parts, dim=1).to(torch.int16) * 3) >> 8
    return levels.float().sub_(1).mul_(half(blocks, 52))


def _tq2_0(blocks: torch.Tensor) -> torch.Tensor:
    return fields(blocks[:, :64].view(-1, 2, 32), 2).flatten(1).float().sub_(1).mul_(half(blocks, 64))


def _looked_up(values: tuple[float, ...], indices: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.tensor(values, dtype=torch.float32, device=indices.device)[indices.int()]


def _mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    """e2m1 by a power of two whose exponent is stored; half of the two least are no normal numbers."""
    import torch

    exponents = blocks[:, :1].to(torch.int32)
    halves = torch.where(exponents < 2, (1 << 21) << exponents.clamp(max=1), (exponents - 1) << 23)
    return _looked_up(DOUBLED, fields(blocks[:, 1:], 4).flatten(1)).mul_(halves.view(torch.float32))


def _nvfp4(blocks: torch.Tensor) -> torch.Tensor:
    """Four runs of sixteen of e2m1, each by a scale in e4m3 whose sign is ignored, and whose NaN is 0."""
    import torch

    stored = blocks[:, :4].to(torch.int32)
    exponents, fractions = (stored >> 3) & 15, (stored & 7).float()
    normal = torch.ldexp(1.0 + fractions / 8, exponents - 8)
    halves = torch.where(exponents == 0, fractions * 2.0**-10, normal).masked_fill_(stored == 127, 0.0)
    levels = _looked_up(DOUBLED, fields(blocks[:, 4:].view(-1, 4, 8), 4).flatten(2))
    return levels.mul_(halves.unsqueeze(2)).flatten(1)


def _iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    return _looked_up(UNEVEN, fields(blocks[:, 2:], 4).flatten(1)).mul_(half(blocks, 0))


def _iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    """Eight runs of 32, each with a scale of six bits: four in one field, two in another."""
    low = in_order(blocks[:, 4:8], 4)
    high = in_order(blocks[:, 2:4], 2)
    steps = half(blocks, 0) * (low + 16 * high).float().sub_(32)
    levels = _looked_up(UNEVEN, fields(blocks[:, 8:].view(-1, 8, 16), 4).flatten(2))
    return levels.mul_(steps.unsqueeze(2)).flatten(1)


UNPACK: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{"Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0},
    **{"Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k},
    **{"TQ1_0": _tq1_0, "TQ2_0": _tq2_0, "MXFP4": _mxfp4, "NVFP4": _nvfp4, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs},
    **UNPACK_IQ,
}
"""By type: float32 [blocks, columns] of blocks [blocks, bytes]."""
