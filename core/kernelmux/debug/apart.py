"""How far the results of two kernels are apart, by node, and in which rows.

Enters: results of both, row by row. Leaves: NMSE of the first against the second, and the positions where it is large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelmux.debug.rows import at_positions
from kernelmux.graph.formats import human_count

if TYPE_CHECKING:
    import torch


SLACK = 10.0
"""Times what kernels say that they err by, which is what is taken for rounding unless told: they say it of the numbers
that the suite draws, and a model's have outliers."""


@dataclass
class Apart:
    """How far one node's kernel was from the second one, over all launches that both made."""

    node: str
    op: str
    kernel: str
    second: str
    bound: float
    """NMSE over which it is told of: SLACK times the sum of what both kernels state, unless it was given."""
    launches: int = 0
    worst: float = 0.0
    """NMSE of the worst launch; infinite where one of the two has made a NaN and the other none."""
    mean: float = 0.0
    """NMSE of a launch."""
    position: int = 0
    """Of the token whose row was the worst of the worst launch."""
    over: tuple[int, int] | None = None
    """The first and the last position whose row was over the bound, in launches that were."""

    @property
    def share(self) -> float:
        """The worst as a share of the bound."""
        return ratio(self.worst, self.bound)

    def count(self, rows: Sequence[tuple[float, float, int]]) -> None:
        """One launch more, by the squared error, the square and the position of each of its rows."""
        if not rows:
            return
        mean = sum(square for _, square, _ in rows) / len(rows)
        nmse = ratio(sum(error for error, _, _ in rows), mean * len(rows))
        # A row of next to nothing counts as one of the mean.
        by_row = [(ratio(error, max(square, mean)), position) for error, square, position in rows]
        self.mean = (self.mean * self.launches + nmse) / (self.launches + 1)
        self.launches += 1
        if nmse >= self.worst:
            self.worst, self.position = nmse, max(by_row)[1]
        if nmse > self.bound:
            over = [position for error, position in by_row if error > self.bound] or [max(by_row)[1]]
            first, last = self.over or (over[0], over[0])
            self.over = min(first, *over), max(last, *over)

    def __str__(self) -> str:
        where = at_positions(*(self.over or (self.position, self.position)))
        launches = human_count(self.launches, "launch", "launches")
        return (
            f"{self.node} ({self.op}): {self.kernel} is {self.worst:.2g} from {self.second} at worst, {self.mean:.2g} "
            f"on average of {launches}, where {self.bound:.2g} is the bound; {where}"
        )


def errors_of(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Of [..., rows, columns] each row's squared error and the square of what is wanted: [2, ..., rows], float64."""
    import torch

    found, wanted = found.double(), wanted.double()
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    errors = (found - wanted).square().masked_fill(same, 0).nan_to_num(nan=math.inf, posinf=math.inf)
    return torch.stack([errors.sum(-1), wanted.square().nan_to_num(nan=0, posinf=0).sum(-1)])


def ratio(error: float, square: float) -> float:
    """An error as a share of what it is an error of; infinite where that is nothing."""
    return error / square if square else 0.0 if not error else math.inf
