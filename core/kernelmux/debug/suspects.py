"""Suspects of a wrong result, and two ways to look at their launches: made by the reference, or again beside it.

Enters: a plan, row counts, a session. Leaves: nodes at row counts, with their kernels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from kernelmux.contract.answers import bound
from kernelmux.contract.kernel import Launch
from kernelmux.debug.second import Second
from kernelmux.debug.shadow import Shadow
from kernelmux.errors import PlanError
from kernelmux.graph.domain import Range
from kernelmux.graph.formats import human_count
from kernelmux.plan.plan import Plan
from kernelmux.run.session import Session
from kernelmux.run.walk import Walk
from kernelmux.run.watch import Observer

REFERENCE = "reference"
TRUTH = "reference:f32"
"""The kernel that makes a launch in another's place."""
FEW_NAMES = 4


@dataclass(frozen=True)
class Suspect:
    """A node of a plan at some row counts, and its kernel."""

    node: str
    op: str
    kernel: str
    rows: tuple[int, int]
    """From as many to as many, of which it was run at some."""
    parts: tuple[str, ...] = ()
    """The plain nodes that a fused one stands for."""

    def __str__(self) -> str:
        return f"{self.kernel} at {self.node} ({self.op}), {self.at}"

    @property
    def at(self) -> str:
        """The row counts, in words."""
        low, high = self.rows
        return f"{low} to {high} rows" if low != high else human_count(low, "row")


def in_words(suspects: Sequence[Suspect]) -> list[str]:
    """A line for each, or one for all of a kernel, op and row count where these are more than a few."""
    alike: dict[tuple[str, str, str], list[Suspect]] = {}
    for suspect in suspects:
        alike.setdefault((suspect.kernel, suspect.op, suspect.at), []).append(suspect)
    lines: list[str] = []
    for (kernel, op, at), several in alike.items():
        if len(several) <= FEW_NAMES:
            lines += map(str, several)
        else:
            first, *_, last = (suspect.node for suspect in several)
            lines.append(f"{kernel} at {len(several)} nodes ({op}), {at}: from {first} to {last}")
    return lines


def suspects_of(plan: Plan, counts: Collection[int]) -> Iterator[Suspect]:
    """The steps of the walks at these row counts but for the reference's own, in the order of the walks.

    Each is told of as many rows as the next smaller walk has not, the last up to what the plan takes.
    """
    low = 1
    for count in sorted(counts):
        high = plan.max_rows if count == max(counts) else count
        for step in plan.schedule(count, count).steps:
            if step.choice.backend != REFERENCE:
                parts = plan.fused.get(step.node.name, ())
                yield Suspect(step.node.name, step.node.op, step.choice.name, (low, high), parts)
        low = count + 1


class Swap(Observer):
    """Makes the launches of some suspects by the reference, on the memory that their own kernels would have used."""

    def __init__(self, session: Session, swapped: Collection[Suspect]) -> None:
        self.session = session
        self.swapped = dict[str, list[Range]]()
        for suspect in swapped:
            self.swapped.setdefault(suspect.node, []).append(Range(*suspect.rows))
        self._launches: dict[tuple[Walk, int], Launch] = {}

    def launch(self, walk: Walk, index: int, call: Launch) -> None:
        rows = walk.steps[0].node.rows
        if not any(rows in swapped for swapped in self.swapped.get(walk.steps[index].node.name, ())):
            call()
            return
        if (walk, index) not in self._launches:
            self._launches[walk, index] = self._bound(walk, index)
        self._launches[walk, index]()

    def _bound(self, walk: Walk, index: int) -> Launch:
        node, walker = walk.steps[index].node, self.session.walker
        offer = walker.plan.registry.offer(node, walk.device, REFERENCE)
        kernel = offer.kernels.get(TRUTH)
        if kernel is None:
            raise PlanError(
                f"{TRUTH} does not take {node.name} ({node.op}); install kernelmux-reference to look for faults"
            )
        with walk.device.platform.on(walker.stream):
            packed = walker.packed.get(node, TRUTH, kernel)
            return bound(kernel, node, replace(walk.tensors[index], packed=packed), walker.stream)


class Beside(Observer):
    """Has the reference make launches again on copies of their inputs, and keeps walks of other row counts apart."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._shadows: dict[int, Shadow] = {}

    def tells_against(self, suspect: Suspect) -> bool:
        """Whether one of its launches was far beyond what both kernels state."""
        rows = Range(*suspect.rows)
        told = (apart for count, shadow in self._shadows.items() if count in rows for apart in shadow.found)
        return any(apart.node == suspect.node and apart.share > 1 for apart in told)

    def wants(self, walk: Walk, rehearsal: bool) -> bool:
        return self._of(walk).wants(walk, rehearsal)

    def before(self, walk: Walk, index: int) -> None:
        self._of(walk).before(walk, index)

    def after(self, walk: Walk, index: int) -> None:
        self._of(walk).after(walk, index)

    def end(self, walk: Walk) -> None:
        self._of(walk).end(walk)

    def _of(self, walk: Walk) -> Shadow:
        rows = walk.steps[0].node.rows
        if rows not in self._shadows:
            self._shadows[rows] = Shadow(self.session, Second(REFERENCE, every=1))
        return self._shadows[rows]
