"""How far a result is from the truth: NMSE over the whole, over each row and column, and the worst element."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

WORST = 24.0
"""How many standard deviations, by the NMSE bound, one element may be off: rounding stays within six or so."""

LINE = 24.0
"""How many times the bound one row's or one column's NMSE may be."""

FEW = 5
"""Rows below which the noise of a column says little."""

NARROW = 16
"""Columns below which a row's mean square says little: sums may cancel in all of them."""


@dataclass(frozen=True)
class Measured:
    """The error of one output, its bound, and what is wrong with it."""

    error: float
    worst: float
    bound: float
    failures: tuple[str, ...]


def compare(
    found: torch.Tensor,
    wanted: torch.Tensor,
    bound: float,
    block: int = 1,
    peer: tuple[float, float] = (0.0, 0.0),
) -> Measured:
    """`found` against the float64 `wanted`: finite where that is, within `bound` (NMSE), nothing in it far off.

    `block` columns with a scale of their own count as a row. `peer` is the NMSE of a kernel that `found` need not be
    closer than, and that kernel's worst element.
    """
    found = found.double()
    # Where the truth is infinite or no number, so must the result be; elsewhere it must be finite.
    alike = torch.where(wanted.isfinite(), found.isfinite(), (found == wanted) | (found.isnan() & wanted.isnan()))
    if not bool(alike.all()):
        where = _index(~alike)
        return Measured(math.inf, math.inf, bound, (f"finite: element {where} is {float(found[where])}",))
    truth = torch.where(wanted.isfinite(), wanted, 0.0)
    difference = torch.where(wanted.isfinite(), found - wanted, 0.0)
    # Below the smallest normal float32 precision runs out, and hardware may flush to zero.
    difference = torch.where(difference.abs() < torch.finfo(torch.float32).tiny, 0.0, difference)
    squared = float(truth.square().sum())
    error = float(difference.square().sum()) / (squared or 1.0)
    relative = _by_row(truth, difference, block)
    worst = float(relative.max()) if relative.numel() else 0.0
    allowed = max(bound, peer[0])
    most = max(WORST * math.sqrt(allowed), peer[1])
    failures = []
    if error > allowed:
        failures.append(f"error: NMSE {error:.3g} is over the bound {allowed:.3g}")
    elif worst > most:
        where = _index(relative == relative.max())
        failures.append(
            f"error: element {where} is {float(found[where]):.6g}, not {float(wanted[where]):.6g}: "
            f"{worst:.3g} of its row's root mean square, where {most:.3g} is allowed"
        )
    elif lost := _lost_line(truth, difference, relative, LINE * allowed):
        failures.append(f"error: {lost}, where {LINE * allowed:.3g} is allowed")
    return Measured(error, worst, bound, tuple(failures))


def _by_row(truth: torch.Tensor, difference: torch.Tensor, block: int) -> torch.Tensor:
    """Each element's error over the root mean square of its row, or of its block.

    A row of zeros, or one too narrow to have a scale of its own, is measured against all rows; all zeros against one.
    """
    columns = block if block > 1 else truth.shape[-1]
    blocks = (*truth.shape[:-1], -1, max(columns, 1))
    rows = truth.reshape(blocks).square().mean(dim=-1, keepdim=True)
    everything = rows.mean() if bool(rows.any()) else torch.ones_like(rows.mean())
    rows = torch.where(rows > (0 if columns >= NARROW else math.inf), rows, everything).sqrt()
    return (difference.abs().reshape(blocks) / rows).view(truth.shape)


def _lost_line(truth: torch.Tensor, difference: torch.Tensor, relative: torch.Tensor, most: float) -> str:
    """A row or a column that is wrong throughout, which the whole hides as its elements hide in the noise."""
    lines = {"row": relative.flatten(0, -2).square().mean(dim=1)} if truth.dim() > 1 else {}
    if truth.dim() > 1 and truth.flatten(0, -2).shape[0] >= FEW:
        scales = truth.flatten(0, -2).square().mean(dim=0)
        # A small column has the noise of the others too.
        scales = scales.clamp(min=float(scales.mean()) / 4)
        errors = difference.flatten(0, -2).square().mean(dim=0)
        lines["column"] = errors / torch.where(scales > 0, scales, 1.0)
    for name, errors in lines.items():
        if errors.numel() and float(errors.max()) > most:
            return f"{name} {int(errors.argmax())} has NMSE {float(errors.max()):.3g}"
    return ""


def _index(mask: torch.Tensor) -> tuple[int, ...]:
    """The first place where `mask` holds."""
    return tuple(int(i) for i in mask.nonzero()[0])
