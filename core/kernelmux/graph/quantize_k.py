"""float32 as GGUF's superblocks of 256, whose runs' scales are themselves stored in few bits.

Enters: float32 [blocks, 256]. Leaves: blocks of one type, as bytes [blocks, size]. Layouts: ggml-common.h in llama.cpp.
Once all levels are known, a superblock's own scale is fitted to them by least squares, and the levels are rounded anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelmux.graph.bit_fields import as_bytes, as_half, joined
from kernelmux.graph.scale_search import affine_scales, symmetric_scales

if TYPE_CHECKING:
    import torch


def q4_k(values: torch.Tensor) -> torch.Tensor:
    """Eight runs of 32, each with a scale and a minimum of six bits; two runs share bytes."""
    import torch

    head, q = _runs_of_32(values, 16)
    return torch.cat([head, joined(q.view(-1, 4, 2, 32), 4).flatten(1)], dim=1)


def q5_k(values: torch.Tensor) -> torch.Tensor:
    """The same with a fifth bit, of which each byte has one of every run."""
    import torch

    head, q = _runs_of_32(values, 32)
    low = joined((q & 15).view(-1, 4, 2, 32), 4).flatten(1)
    return torch.cat([head, joined(q >> 4, 1), low], dim=1)


def q6_k(values: torch.Tensor) -> torch.Tensor:
    """Sixteen runs of sixteen, each with a signed scale of eight bits."""
    import torch

    runs = values.view(-1, 16, 16)
    scales = symmetric_scales(runs.reshape(-1, 16), 32, weighted=True).view(-1, 16, 1)
    whole = as_half(scales.gather(1, scales.abs().argmax(dim=1, keepdim=True)) / -128)
    steps = _divided(scales, whole).round_().clamp_(-128, 127)
    q = _divided(runs, whole * steps).round_().clamp_(-32, 31)
    cross, square = (runs * q * steps).sum((1, 2), keepdim=True), (q * steps).square_().sum((1, 2), keepdim=True)
    whole = as_half(_divided(cross, square))
    q = _divided(runs, whole * steps).round_().clamp_(-32, 31).add_(32).to(torch.uint8).view(-1, 256)
    low = joined((q & 15).view(-1, 2, 2, 64), 4).flatten(1)
    high = joined((q >> 4).view(-1, 2, 4, 32), 2).flatten(1)
    return torch.cat([low, high, as_bytes(steps.flatten(1).to(torch.int8)), as_bytes(whole.flatten(1).half())], dim=1)


def _runs_of_32(values: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first 16 bytes of a superblock (two scales, then six bits for each run's), and levels [blocks, 8, 32]."""
    import torch

    runs = values.view(-1, 8, 32)
    scales, least = (part.view(-1, 8, 1) for part in affine_scales(runs.reshape(-1, 32), levels, weighted=True))
    whole, deep = (as_half(part.amax(1, keepdim=True) / 63) for part in (scales, -least))
    steps, depths = (_divided(part, by).round_().clamp_(0, 63) for part, by in ((scales, whole), (-least, deep)))
    q = _nearest(runs, whole * steps, deep * depths, levels)
    whole, deep = _fitted(runs, q * steps, depths, whole, deep)
    q = _nearest(runs, whole * steps, deep * depths, levels).to(torch.uint8)
    parts = [as_bytes(part.flatten(1).half()) for part in (whole, deep)]
    return torch.cat([*parts, _six_bits(steps.flatten(1), depths.flatten(1))], dim=1), q


def _fitted(
    runs: torch.Tensor, multiples: torch.Tensor, depths: torch.Tensor, whole: torch.Tensor, deep: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales d and e of least squared error of runs = d multiples - e depths; those given where none are better."""
    import torch

    depths = depths.expand_as(multiples)
    pairs = ((multiples, multiples), (multiples, depths), (depths, depths), (runs, multiples), (runs, depths))
    mm, md, dd, xm, xd = ((a * b).sum((1, 2), keepdim=True) for a, b in pairs)
    determinant = mm * dd - md * md
    free = determinant > 1e-6 * mm * dd
    first = torch.where(free, _divided(xm * dd - xd * md, determinant), _divided(xm + deep * md, mm))
    second = torch.where(free, _divided(xm * md - xd * mm, determinant), deep)
    better = (first > 0) & (second >= 0)
    return as_half(torch.where(better, first, whole)), as_half(torch.where(better, second, deep))


def _nearest(runs: torch.Tensor, scales: torch.Tensor, least: torch.Tensor, levels: int) -> torch.Tensor:
    return _divided(runs + least, scales).round_().clamp_(0, levels - 1)


def _divided(values: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Quotients, 0 where the divisor is."""
    import torch

    return torch.where(by == 0, 0.0, values / torch.where(by == 0, 1.0, by))


def _six_bits(scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """Eight scales and eight minima below 64 in twelve bytes: two bits of the last four lie in the first."""
    import torch

    s, m = scales.to(torch.uint8), minima.to(torch.uint8)
    first, second = (part[:, :4] | (part[:, 4:] >> 4) << 6 for part in (s, m))
    return torch.cat([first, second, (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4], dim=1)
