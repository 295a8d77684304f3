"""float32 as GGUF's blocks: what `dequantize_blocks` takes apart is put together here, by torch, wherever it lies.

Enters: float32 [blocks, columns]. Leaves: blocks of one type, as bytes [blocks, size]. The layouts are those of
ggml-common.h in llama.cpp; the scales are searched for (scale_search.py). quantize_k.py has the superblocks of 256.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kernelmux.graph.bit_fields import as_bytes, as_half, joined
from kernelmux.graph.dequantize import DOUBLED, dequantize_blocks
from kernelmux.graph.quantize_k import q4_k, q5_k, q6_k
from kernelmux.graph.scale_search import affine_scales, symmetric_scales

if TYPE_CHECKING:
    import torch


def quantize_blocks(name: str, values: torch.Tensor) -> torch.Tensor:
    """Blocks [blocks, bytes] of one of QUANTIZE's types, of finite float32 [blocks, columns], on their device.

    A scale that float16 does not hold becomes infinite.
    """
    return QUANTIZE[name](values)


def _q4_0(values: torch.Tensor) -> torch.Tensor:
    import torch

    scale, q = _symmetric(values, 8)
    return torch.cat([as_bytes(scale.half()), joined(q.view(-1, 2, 16), 4)], dim=1)


def _q4_1(values: torch.Tensor) -> torch.Tensor:
    import torch

    scale, least, q = _affine(values, 16)
    return torch.cat([as_bytes(scale.half()), as_bytes(least.half()), joined(q.view(-1, 2, 16), 4)], dim=1)


def _q5_0(values: torch.Tensor) -> torch.Tensor:
    import torch

    scale, q = _symmetric(values, 16)
    return torch.cat([as_bytes(scale.half()), _fifth_bits(q), joined((q & 15).view(-1, 2, 16), 4)], dim=1)


def _q5_1(values: torch.Tensor) -> torch.Tensor:
    import torch

    scale, least, q = _affine(values, 32)
    low = joined((q & 15).view(-1, 2, 16), 4)
    return torch.cat([as_bytes(scale.half()), as_bytes(least.half()), _fifth_bits(q), low], dim=1)


def _q8_0(values: torch.Tensor) -> torch.Tensor:
    import torch

    scale = as_half(values.abs().amax(1, keepdim=True) / 127)
    q = _levels(values, scale).clamp_(-127, 127).to(torch.int8)
    return torch.cat([as_bytes(scale.half()), q.view(torch.uint8)], dim=1)


def _symmetric(values: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales that float16 holds, and levels from 0 on."""
    import torch

    scale = as_half(symmetric_scales(values, levels, weighted=False))
    return scale, _levels(values, scale).clamp_(-levels, levels - 1).add_(levels).to(torch.uint8)


def _affine(values: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales and minima that float16 holds, and levels."""
    import torch

    scale, least = map(as_half, affine_scales(values, levels, weighted=False))
    return scale, least, _levels(values - least, scale).clamp_(0, levels - 1).to(torch.uint8)


def _levels(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.where(scale == 0, 0.0, values / torch.where(scale == 0, 1.0, scale)).round_()


def _fifth_bits(q: torch.Tensor) -> torch.Tensor:
    """The fifth bits of levels [blocks, 32], in their order: [blocks, 4]."""
    return joined((q >> 4).view(len(q), 4, 8).mT, 1)


def _mxfp4(values: torch.Tensor) -> torch.Tensor:
    """The better of two exponents: the least that holds the largest magnitude, and one below, which clips it."""
    import torch

    _, exponent = torch.frexp(values.abs().amax(1, keepdim=True))
    # e2m1 reaches 6, between 2^2 and 2^3.
    highest = (exponent.to(torch.int32) - 3 + 127 + 1).clamp_(2, 254)
    made = [_with_exponent(values, highest - below) for below in (0, 1)]
    errors = [(dequantize_blocks("MXFP4", blocks) - values).square_().sum(1, keepdim=True) for blocks in made]
    return torch.where(errors[1] < errors[0], made[1], made[0])


def _with_exponent(values: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    import torch

    magnitudes = torch.tensor(DOUBLED[:8], dtype=torch.float32, device=values.device)
    between = (magnitudes[1:] + magnitudes[:-1]) / 2
    doubled = torch.ldexp(values, 128 - exponent)
    q = torch.bucketize(doubled.abs(), between).to(torch.uint8) | (doubled < 0).to(torch.uint8) << 3
    return torch.cat([exponent.to(torch.uint8), joined(q.view(-1, 2, 16), 4)], dim=1)


QUANTIZE: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{"Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0},
    **{"Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k, "MXFP4": _mxfp4},
}
"""By type: blocks [blocks, bytes] of float32 [blocks, columns]."""
