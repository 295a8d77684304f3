"""How far a result is from the truth: NMSE over the whole, over each row and column, and the worst element.

What is wrong is said with the worst element, and where the wrong ones sit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kernelmux.conformance.located import PLAIN, Layout, first_index

ROUNDING = 6.0
"""How many standard deviations, by the NMSE bound, rounding puts an element off."""

WORST = 4 * ROUNDING
"""How many of them one element may be off."""

LINE = 24.0
"""How many times the bound one row's or one column's NMSE may be."""

SMALLEST = 0.25
"""Of the mean square of all, what a column has at least."""

FEW = 5
"""Rows below which the noise of a column says little."""

NARROW = 16
"""Columns below which a row's mean square says little: sums may cancel in all of them."""

ONE_NUMBER = 1e-6
"""By what share of itself a number may differ from the others of its row and be the same."""

EDGE = 0.01
"""How near to the largest number of a dtype, as a share of it, any result may be infinite or not."""


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
    batch: torch.Tensor | None = None,
    layout: Layout = PLAIN,
    dtype: torch.dtype | None = None,
    precision: float = 0.0,
    kept: torch.Tensor | None = None,
) -> Measured:
    """`found` against the float64 `wanted`: finite where that is, within `bound` (NMSE), nothing in it far off.

    `block` columns with a scale of their own count as a row. `peer` is the NMSE of a kernel that `found` need not be
    closer than, and that kernel's worst element. `batch` holds the rows that `wanted` is one of: a narrow row's sums
    may cancel, so that it has their scale. `layout` is how failures call the output and its places. Where elements are
    stored as `dtype`, or `kept` is the truth as blocks with scales hold it, what storing the truth itself costs is no
    failure of a kernel with `precision` of its own.
    """
    found = found.double()
    if dtype is not None:
        wanted = _held(wanted, found, dtype, bound)
    # Where the truth is infinite or no number, so must the result be; elsewhere it must be finite.
    alike = torch.where(wanted.isfinite(), found.isfinite(), (found == wanted) | (found.isnan() & wanted.isnan()))
    if not bool(alike.all()):
        failure = f"finite: {layout.element(first_index(~alike), found, wanted)}; {layout.located(~alike)}"
        return Measured(math.inf, math.inf, bound, (failure,))
    truth = torch.where(wanted.isfinite(), wanted, 0.0)
    difference = torch.where(wanted.isfinite(), found - wanted, 0.0)
    # Below the smallest normal float32 precision runs out, and hardware may flush to zero. Below that of float16 half a
    # step is right.
    least_step = max(torch.finfo(torch.float32).tiny, _half_step(dtype))
    difference = torch.where(difference.abs() <= least_step, 0.0, difference)
    least = _mean_square(batch) if batch is not None and truth.shape[-1] < NARROW else 0.0
    squared = max(float(truth.square().sum()), least * truth.numel())
    error = float(difference.square().sum()) / (squared or 1.0)
    rows = _row_scales(truth, block, least)
    relative = difference.abs() / rows
    worst = float(relative.max()) if relative.numel() else 0.0
    storing = _storing(truth, kept, dtype)
    least_error = (float(storing.square().sum()) / (squared or 1.0)) ** 0.5 + math.sqrt(precision)
    allowed = max(bound, peer[0], least_error**2)
    furthest = float((storing / rows).max()) if storing.numel() else 0.0
    most = max(WORST * math.sqrt(allowed), peer[1], furthest + WORST * math.sqrt(precision))
    of_a_line = max(LINE * allowed, peer[1] ** 2 / SMALLEST)
    if error > allowed:
        failure = f"NMSE {error:.3g} is over the bound {allowed:.3g}"
    elif worst > most:
        failure = f"an element is {worst:.3g} of its row's root mean square off, where {most:.3g} is allowed"
    elif lost := _lost_line(truth / rows, (relative - storing / rows).clamp(min=0), of_a_line):
        failure = f"{lost}, where {of_a_line:.3g} is allowed"
    else:
        return Measured(error, worst, bound, ())
    wrong = relative > min(ROUNDING * math.sqrt(allowed), worst / 2)
    element = layout.element(first_index(relative == worst), found, wanted)
    return Measured(error, worst, bound, (f"error: {failure}; the worst is {element}; {layout.located(wrong)}",))


def _held(wanted: torch.Tensor, found: torch.Tensor, dtype: torch.dtype, bound: float) -> torch.Tensor:
    """The truth as a dtype can hold it: beyond its largest number infinite, and near it whichever was found.

    Near is what an element may be off by: a row of larger ones has their error.
    """
    largest = torch.finfo(dtype).max
    infinite = torch.where(wanted > 0, math.inf, -math.inf).to(wanted.dtype)
    rows = torch.where(wanted.isfinite(), wanted, 0.0).square().mean(dim=-1, keepdim=True).sqrt()
    off = (WORST * math.sqrt(bound) * rows).clamp(min=EDGE * largest)
    beyond = wanted.isfinite() & (wanted.abs() > largest)
    near = (wanted.abs() - largest).abs() < off
    return torch.where(near & (found == infinite), infinite, torch.where(beyond & ~near, infinite, wanted))


def _half_step(dtype: torch.dtype | None) -> float:
    """Half the distance between the smallest numbers of a dtype; a hair more, as float32 sums are rounded too."""
    return 0.501 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps if dtype else 0.0


def _storing(truth: torch.Tensor, kept: torch.Tensor | None, dtype: torch.dtype | None) -> torch.Tensor:
    """How far off each element of the truth itself is as it is stored.

    In a row of one number half a step of the dtype: errors that are all the same do not cancel, and what is a little
    off before it is stored goes to the next number in all of the row.
    """
    if kept is None and dtype is None:
        return torch.zeros_like(truth)
    storing = ((truth.to(dtype) if kept is None else kept).double() - truth).abs().nan_to_num(posinf=0.0)
    if dtype is None or truth.dim() < 1 or truth.shape[-1] < 2:
        return storing
    least, most = truth.aminmax(dim=-1, keepdim=True)
    one_number = most - least <= ONE_NUMBER * truth.abs()
    if not bool(one_number.any()):
        return storing
    half_step = torch.ldexp(torch.full_like(truth, torch.finfo(dtype).eps / 4), torch.frexp(truth).exponent)
    return torch.where(one_number, torch.maximum(storing, half_step), storing)


def _mean_square(truth: torch.Tensor) -> float:
    finite = truth[truth.isfinite()]
    return float(finite.square().mean()) if finite.numel() else 0.0


def _row_scales(truth: torch.Tensor, block: int, least: float) -> torch.Tensor:
    """The root mean square of each element's row, or of its block, [..., columns].

    For a row of zeros that of all rows, or `least` (a mean square) where that is more; for all zeros one. A row too
    narrow, in which sums may cancel, has no less than that.
    """
    columns = block if block > 1 else truth.shape[-1]
    blocks = truth.reshape(*truth.shape[:-1], -1, max(columns, 1))
    rows = blocks.square().mean(dim=-1, keepdim=True)
    everything = rows.mean().clamp(min=least)
    everything = everything if bool(everything > 0) else torch.ones_like(everything)
    rows = (torch.where(rows > 0, rows, everything) if columns >= NARROW else torch.maximum(rows, everything)).sqrt()
    return rows.expand(blocks.shape).reshape(truth.shape)


def _lost_line(truth: torch.Tensor, difference: torch.Tensor, most: float) -> str:
    """A row or column that is wrong throughout, which the whole hides as its elements hide in the noise.

    Both are relative to their rows, so that a large row is not all that counts.
    """
    if truth.dim() < 2:
        return ""
    truth, squares = truth.flatten(0, -2), difference.flatten(0, -2).square()
    lines = {"row": squares.mean(dim=1)}
    if len(truth) >= FEW:
        # A small column has the noise of the others too.
        lines["column"] = squares.mean(dim=0) / truth.square().mean(dim=0).clamp(min=SMALLEST)
    for name, errors in lines.items():
        if errors.numel() and float(errors.max()) > most:
            return f"{name} {int(errors.argmax())} has NMSE {float(errors.max()):.3g}"
    return ""
