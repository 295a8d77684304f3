"""Scales for numbers that are stored as a few levels: those of least weighted squared error among some candidates.

Enters: float32 [runs, n], the numbers that share a scale. Leaves: a scale for each run, and a minimum where the format
has one. For the levels that a candidate leads to, the best scale and minimum are those of linear least squares, in
closed form; the candidates lie about what maps the largest magnitude to the last level.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STEPS = sorted((step / 10 for step in range(-10, 11)), key=abs)
"""Levels by which candidates map the largest magnitude beside the last one: the nearest first, so that numbers which
are levels already stay what they are."""
TINY = 1e-30


def symmetric_scales(values: torch.Tensor, levels: int, weighted: bool) -> torch.Tensor:
    """Scales s [runs, 1] of either sign for values = s q with q from -levels to levels - 1; 0 for a run of zeros.

    The number of largest magnitude gets the negative end, which reaches further.
    """
    import torch

    values = values.T.contiguous()  # A run is a column: sums over rows are what processors add fastest.
    peak = values.gather(0, values.abs().argmax(dim=0, keepdim=True))
    x = values / torch.where(peak == 0, 1.0, -peak)
    weights = _weights(x, weighted)
    weighed = weights * x
    gain, best = torch.zeros_like(peak), torch.zeros_like(peak)
    for step in STEPS:
        q = (x * (levels + step)).round_().clamp_(-levels, levels - 1)
        cross = (weighed * q).sum(0, keepdim=True)
        square = q.square_().mul_(weights).sum(0, keepdim=True).clamp_(min=TINY)
        scale = cross / square
        # By how much the squared error is less than that of zeros.
        better = scale * cross > gain
        gain = torch.where(better, scale * cross, gain)
        best = torch.where(better, scale, best)
    return (best * -peak).T


def affine_scales(values: torch.Tensor, levels: int, weighted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales s >= 0 and minima m, each [runs, 1], for values = s q + m with q from 0 to levels - 1.

    Where `weighted`, for formats that store the minimum's magnitude: it is never above 0.
    """
    import torch

    values = values.T.contiguous()
    low, high = values.amin(0, keepdim=True), values.amax(0, keepdim=True)
    if weighted:
        low, high = low.clamp(max=0), high.clamp(min=0)
    span = high - low
    unit = torch.where(span == 0, 1.0, span)
    weights = _weights(values / unit, weighted)
    # The numbers above the least, as a share of the span: sums of them lose less in float32.
    x, low = (values - low) / unit, low / unit
    weighed = weights * x
    total, mean = weights.sum(0, keepdim=True).clamp_(min=TINY), weighed.sum(0, keepdim=True)
    error = torch.full_like(span, torch.inf)
    best, offset = torch.zeros_like(span), torch.zeros_like(span)
    for step in STEPS:
        # From the best minimum so far on: the levels move with it.
        q = (x - offset).mul_(levels - 1 + step).round_().clamp_(0, levels - 1)
        cross = (weighed * q).sum(0, keepdim=True)
        by_weight = weights * q
        linear = by_weight.sum(0, keepdim=True)
        square = q.mul_(by_weight).sum(0, keepdim=True).clamp_(min=TINY)
        variance = total * square - linear * linear
        flat = variance <= 1e-6 * total * square
        scale = torch.where(flat, cross / square, (total * cross - mean * linear) / variance)
        shift = (mean - scale * linear) / total
        if weighted:
            above = low + shift > 0
            scale = torch.where(above, (cross + low * linear) / square, scale)
            shift = torch.where(above, -low, shift)
        found = scale * (scale * square + 2 * shift * linear - 2 * cross) + shift * (shift * total - 2 * mean)
        better = (found < error) & (scale >= 0)
        error = torch.where(better, found, error)
        best, offset = torch.where(better, scale, best), torch.where(better, shift, offset)
    return (best * unit).T, ((low + offset) * unit).T


def _weights(x: torch.Tensor, weighted: bool) -> torch.Tensor:
    """How much each number's error counts: all alike, or by its own magnitude and that of its run."""
    import torch

    return x.square().mean(0, keepdim=True).sqrt() + x.abs() if weighted else torch.ones_like(x)
