"""A sample of a session's walks made again by second kernels, launch by launch, and how far the two are apart.

Enters: whose kernels, and a session at work. Leaves: for each node and both its kernels the errors, as NMSE of the
first against the second. The second one reads copies and writes memory of its own: results stay what they are, and of
the walks between nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from kernelmux.debug.rows import LiveRows, Rows, at_positions
from kernelmux.debug.second import Binder, Second, Twin
from kernelmux.errors import KernelmuxError, contained, nearest
from kernelmux.graph.formats import human_count, lookup
from kernelmux.run.session import Session
from kernelmux.run.walk import Walk
from kernelmux.run.watch import Observer

if TYPE_CHECKING:
    import torch


@dataclass
class Apart:
    """How far one node's kernel was from the second one, over all launches that both made."""

    node: str
    op: str
    kernel: str
    second: str
    bound: float
    """NMSE over which it is told of: the sum of what both kernels state, unless it was given."""
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
        return _ratio(self.worst, self.bound)

    def count(self, rows: Sequence[tuple[float, float, int]]) -> None:
        """One launch more, by the squared error, the square and the position of each of its rows."""
        if not rows:
            return
        mean = sum(square for _, square, _ in rows) / len(rows)
        nmse = _ratio(sum(error for error, _, _ in rows), mean * len(rows))
        # A row of next to nothing counts as one of the mean.
        by_row = [(_ratio(error, max(square, mean)), position) for error, square, position in rows]
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


class Shadow(Observer):
    """Makes the launches of every n-th walk again, the first one's among them."""

    def __init__(self, session: Session, second: Second, limit: float | None = None) -> None:
        """`limit` is the NMSE over which a node is told of. KernelmuxError where there is no such backend."""
        working = session.plan.registry.working
        if second.backend not in working:
            raise KernelmuxError(f"no backend {second.backend!r} to shadow with{nearest(second.backend, working)}")
        self.session, self.second, self.limit = session, second, limit
        self.walks = self.sampled = 0
        self._binder = Binder(session, second)
        self._twins: dict[Walk, list[Twin | None]] = {}
        self._found: dict[tuple[str, str], Apart] = {}
        self._sums: list[tuple[Apart, list[torch.Tensor]]] = []

    @property
    def missing(self) -> dict[str, str]:
        """Nodes of which no launch was made again, and why."""
        compared = {node for node, _ in self._found}
        return {node: reason for node, reason in self._binder.missing.items() if node not in compared}

    @property
    def found(self) -> list[Apart]:
        """The nodes whose launches were made again, the one that is the furthest beyond its bound first."""
        return sorted(self._found.values(), key=lambda each: -each.share)

    @property
    def over(self) -> list[Apart]:
        """Those beyond their bound."""
        return [each for each in self.found if each.worst > each.bound]

    def wants(self, walk: Walk, rehearsal: bool) -> bool:
        if rehearsal:
            return False
        self.walks += 1
        return (self.walks - 1) % self.second.every == 0

    def before(self, walk: Walk, index: int) -> None:
        if index == 0:
            self.sampled += 1
            self._rows = LiveRows(self.session, walk)
            if walk not in self._twins:
                self._twins[walk] = list(self._binder.bind(walk))
        if (twin := self._twins[walk][index]) is not None:
            twin.give(walk.steps[index].node, walk.tensors[index].inputs)

    def after(self, walk: Walk, index: int) -> None:
        if (twin := self._twins[walk][index]) is None:
            return
        try:
            twin.call()
        except BaseException as error:
            self._binder.missing[walk.steps[index].node.name] = f"{twin.name} raised: {contained(error)}"
            self._twins[walk][index] = None
            return
        theirs = self._rows.written(index, twin.node.outputs, twin.tensors.outputs)
        both = zip(self._rows.outputs(index), theirs, strict=True)
        self._sums.append((self._apart(walk, index, twin), [_errors(one, other) for one, other in both]))

    def end(self, walk: Walk) -> None:
        """Fetches what the launches left on the device, at once."""
        import torch

        parts = [part for _, several in self._sums for part in several]
        rows = iter(torch.cat(parts, dim=1).T.tolist() if parts else [])
        for apart, several in self._sums:
            own = islice(rows, sum(part.shape[1] for part in several))
            apart.count([(error, square, int(position)) for error, square, position in own])
        self._sums.clear()

    def _apart(self, walk: Walk, index: int, twin: Twin) -> Apart:
        step = walk.steps[index]
        key = step.node.name, step.choice.name
        if key not in self._found:
            # Both round what they store.
            stores = zip(step.node.outputs, twin.node.outputs, strict=True)
            rounding = max(lookup(one.format).rounding + lookup(other.format).rounding for one, other in stores)
            stated = step.choice.kernel.precision + twin.kernel.precision + rounding
            limit = stated if self.limit is None else self.limit
            self._found[key] = Apart(step.node.name, step.node.op, step.choice.name, twin.name, limit)
        return self._found[key]


def _errors(one: Rows, other: Rows) -> torch.Tensor:
    """[3, rows]: of each row the squared error, the square of what the second kernel has, and the position; float64."""
    import torch

    found, wanted = one.numbers.flatten(1).double(), other.numbers.flatten(1).double()
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    errors = (found - wanted).square().masked_fill(same, 0).nan_to_num(nan=math.inf, posinf=math.inf)
    squares = wanted.square().nan_to_num(nan=0, posinf=0)
    return torch.stack([errors.sum(1), squares.sum(1), one.positions.double()])


def _ratio(error: float, square: float) -> float:
    return error / square if square else 0.0 if not error else math.inf
