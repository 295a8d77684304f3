"""How far a result is from the truth: NMSE over the whole, and the worst element against its row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

WORST = 24.0
"""How many standard deviations, by the NMSE bound, one element may be off: rounding stays within six or so."""

NARROW = 16
"""Columns below which a row's mean square says little: sums may cancel in all of them."""


@dataclass(frozen=True)
class Measured:
    """The error of one output, its bound, and what is wrong with it."""

    error: float
    worst: float
    bound: float
    failures: tuple[str, ...]


def compare(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> Measured:
    """`found` against the float64 `wanted`: finite where that is, within `bound` (NMSE), and no element far off."""
    found = found.double()
    # Where the truth is infinite or no number, so must the result be; elsewhere it must be finite.
    alike = torch.where(wanted.isfinite(), found.isfinite(), (found == wanted) | (found.isnan() & wanted.isnan()))
    if not bool(alike.all()):
        where = _index(~alike)
        return Measured(math.inf, math.inf, bound, (f"finite: element {where} is {float(found[where])}",))
    difference = torch.where(wanted.isfinite(), found - wanted, 0.0)
    # Below the smallest normal float32 precision runs out, and hardware may flush to zero.
    difference = torch.where(difference.abs() < torch.finfo(torch.float32).tiny, 0.0, difference)
    squared = float(torch.where(wanted.isfinite(), wanted, 0.0).square().sum())
    error = float(difference.square().sum()) / (squared or 1.0)
    # A row of zeros, or one too narrow to have a scale of its own, is measured against all rows; all zeros against one.
    rows = wanted.square().nan_to_num(posinf=0.0).mean(dim=-1, keepdim=True)
    everything = rows.mean() if squared else torch.ones_like(rows.mean())
    rows = torch.where(rows > (0 if wanted.shape[-1] >= NARROW else math.inf), rows, everything).sqrt()
    relative = difference.abs() / rows
    worst = float(relative.max()) if relative.numel() else 0.0
    failures = []
    if error > bound:
        failures.append(f"error: NMSE {error:.3g} is over the bound {bound:.3g}")
    elif worst > WORST * math.sqrt(bound):
        where = _index(relative == relative.max())
        failures.append(
            f"error: element {where} is {float(found[where]):.6g}, not {float(wanted[where]):.6g}: "
            f"{worst:.3g} of its row's mean square, where {WORST * math.sqrt(bound):.3g} is allowed"
        )
    return Measured(error, worst, bound, tuple(failures))


def _index(mask: torch.Tensor) -> tuple[int, ...]:
    """The first place where `mask` holds."""
    return tuple(int(i) for i in mask.nonzero()[0])
