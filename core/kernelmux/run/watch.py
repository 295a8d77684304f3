"""Who looks at a session's launches, one by one: what finds faults, times nodes and tells where a walk hangs.

Enters: an Observer, for as long as it is asked. Leaves: the same results, for an observed walk makes the same launches
on the same memory; where it would have been one replay of a graph, or one call of several chained launches, it makes
them one after the other, which gives the same bits, or replays a graph that holds the observer's own launches, too.
Nobody looking costs a comparison a walk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernelmux.contract.kernel import Launch
    from kernelmux.run.walk import Walk


class Observer:
    """Sees every launch of the walks that it wants, in order. All of it is on the session's stream."""

    def wants(self, walk: Walk, rehearsal: bool) -> bool:
        """Whether it looks at this walk, which is about to begin.

        A `rehearsal` is of padding alone, before its first step or its capture, and tells nothing of any sequence.
        """
        return not rehearsal

    def recorded(self, walk: Walk) -> Observer | None:
        """Who looks at a walk that it wants where a graph is to hold it all; None: it is made launch by launch.

        One and the same for walks that it looks at alike: a graph is recorded before its eyes once, and then replayed.
        Until `end`, which comes after each replay, it only launches, and what it reads lies where it always does.
        """
        return None

    def before(self, walk: Walk, index: int) -> None:
        """Called before the launch of a step."""

    def launch(self, walk: Walk, index: int, call: Launch) -> None:
        """Makes the launch; what it raises is the kernel's fault."""
        call()

    def launch_beside(self, walk: Walk, index: int, kernel: str, call: Launch) -> None:
        """Makes another kernel's launch, which an observer has beside the step's own; what it raises is its fault."""
        call()

    def after(self, walk: Walk, index: int) -> None:
        """Called after the launch of a step; the device may still be at work."""

    def end(self, walk: Walk) -> None:
        """Called after the last step."""


@dataclass(eq=False)
class Watch:
    """A session's observer, which all of its walks share."""

    observer: Observer | None = None

    @contextmanager
    def by(self, observer: Observer) -> Iterator[None]:
        """That observer within the block, in the place of whoever it was."""
        before, self.observer = self.observer, observer
        try:
            yield
        finally:
            self.observer = before
