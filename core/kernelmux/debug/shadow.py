"""A sample of a session's walks made again by second kernels, and how far the two are apart.

Enters: whose kernels, and a session at work. Leaves: for each node and both its kernels the errors, as NMSE of the
first against the second. The second one reads copies and writes memory of its own: results stay what they are, and of
the walks between nothing changes. Where a walk is one captured graph, so is the walk with its second launches, from the
second sample on, if a graph can hold them.
"""

from __future__ import annotations

from kernelmux.debug.apart import SLACK, Apart
from kernelmux.debug.look import Look
from kernelmux.debug.second import Binder, Second, Twin, Twins
from kernelmux.errors import KernelmuxError, nearest
from kernelmux.graph.formats import lookup
from kernelmux.run.session import Session
from kernelmux.run.walk import Walk
from kernelmux.run.watch import Observer


class Shadow(Observer):
    """Makes the launches of every n-th walk again, the first one's among them."""

    def __init__(self, session: Session, second: Second, limit: float | None = None) -> None:
        """`limit` is the NMSE over which a node is told of. KernelmuxError where there is no such backend or kernel."""
        working = session.plan.registry.working
        if second.backend not in working:
            raise KernelmuxError(f"no backend {second.backend!r} to shadow with{nearest(second.backend, working)}")
        kernels = {f"{second.backend}:{made.name}" for made in session.plan.registry.classes(second.backend)}
        if second.kernel and kernels and second.kernel not in kernels:
            raise KernelmuxError(f"no kernel {second.kernel} to shadow with{nearest(second.kernel, kernels)}")
        self.session, self.second, self.limit = session, second, limit
        self.walks = self.sampled = 0
        self._binder = Binder(session, second)
        self._twins: dict[Walk, Twins] = {}
        self._looks: dict[Walk, Look] = {}
        """At walks that are made launch by launch."""
        self._recorded: dict[Walk, Look] = {}
        """At walks that a graph holds."""
        self._found: dict[tuple[str, str], Apart] = {}

    @property
    def missing(self) -> dict[str, str]:
        """Nodes of which no launch was made again, and why."""
        compared = {node for node, _ in self._found}
        return {node: reason for node, reason in self._binder.missing.items() if node not in compared}

    @property
    def found(self) -> list[Apart]:
        """The nodes whose launches were made again, the one that is the furthest beyond its bound first."""
        for look in (*self._looks.values(), *self._recorded.values()):
            look.collect()
        return sorted(self._found.values(), key=lambda each: (-each.share, -each.worst))

    @property
    def over(self) -> list[Apart]:
        """Those beyond their bound."""
        return [each for each in self.found if each.worst > each.bound]

    def wants(self, walk: Walk, rehearsal: bool) -> bool:
        if rehearsal:
            return False
        sampled = self.walks % self.second.every == 0
        self.walks += 1
        self.sampled += sampled
        return sampled

    def recorded(self, walk: Walk) -> Observer | None:
        """After one look at a walk, so that libraries have taken the time that they do at first."""
        if walk not in self._looks or not self._twins[walk].capturable:
            return None
        if walk not in self._recorded:
            self._recorded[walk] = self._look(walk)
        return self._recorded[walk]

    def before(self, walk: Walk, index: int) -> None:
        if index == 0 and walk not in self._looks:
            self._twins[walk] = self._binder.bind(walk)
            self._looks[walk] = self._look(walk)
        self._looks[walk].before(walk, index)

    def after(self, walk: Walk, index: int) -> None:
        self._looks[walk].after(walk, index)

    def end(self, walk: Walk) -> None:
        self._looks[walk].end(walk)

    def _look(self, walk: Walk) -> Look:
        return Look(self.session, self._twins[walk], self._apart, self._binder.missing)

    def _apart(self, walk: Walk, index: int, twin: Twin) -> Apart:
        step = walk.steps[index]
        key = step.node.name, step.choice.name
        if key not in self._found:
            # Both round what they store.
            stores = zip(step.node.outputs, twin.node.outputs, strict=True)
            rounding = max(lookup(one.format).rounding + lookup(other.format).rounding for one, other in stores)
            stated = step.choice.kernel.precision + twin.kernel.precision + rounding
            limit = SLACK * stated if self.limit is None else self.limit
            self._found[key] = Apart(step.node.name, step.node.op, step.choice.name, twin.name, limit)
        return self._found[key]
