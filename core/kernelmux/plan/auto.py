"""`auto`: what a whole graph had better run at one row count, where its policy leaves a choice.

Enters: a graph with the places where fused ops may stand, a selector, predicted times. Leaves: the fusions to keep, and
a kernel for every node. For a set of kinds of fusions the kernels are the best there are; which kinds are kept is found
by one more, or one less, as long as that saves time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial

from kernelmux.contract.device import Ceilings, Device
from kernelmux.graph.graph import Graph, TensorNode
from kernelmux.graph.rewrite import Fusion
from kernelmux.measure.steps import is_captured, step_time
from kernelmux.plan.assign import Eliminations, Factor, Option, link_times, minimise, own_times
from kernelmux.plan.fusion import Fusing
from kernelmux.plan.options import Options, Within, is_held
from kernelmux.plan.selection import Held, Selector
from kernelmux.plan.slots import Slotting

MOST_MEMORY = 0.8
"""Share of the device's memory that packed weights may take: the rest is the cache's."""
ALIKE = 1.01
"""What fewer rows run is kept where the best is no faster than by so much, and no more exact: fewer changes are fewer
buckets."""
FAR = 3.0
"""A fused kernel that takes so many times as long as its parts is not tried."""
PAYS = 0.9
"""A second packed form of a weight is taken where the whole then takes no more than this share of its time."""


@dataclass(frozen=True)
class Assigned:
    """What to run at one row count."""

    fusions: tuple[Fusion, ...]
    """Those kept."""
    kernels: Mapping[str, str]
    """By node."""
    us: float
    """Predicted microseconds of a step."""


@dataclass(frozen=True)
class _Found:
    numbers: frozenset[int]
    options: Mapping[int, Option]
    """By slot."""
    us: float
    error: float
    """What all nodes together add."""
    launches: int

    def is_better(self, other: _Found) -> bool:
        """Whether it is faster, or as fast and more exact."""
        return (self.us, self.error) < (other.us, other.error)


@dataclass
class Auto:
    """Assigns for one graph, row count by row count, each from what was found at the one before."""

    graph: Graph
    selector: Selector
    fusing: Fusing
    slotting: Slotting
    _found: dict[int, _Found] = field(default_factory=dict)
    _tried: dict[int, _Found] = field(default_factory=dict)
    """What `most` has found, for `at` right after it."""
    _forms: dict[tuple[int, str], int] = field(default_factory=dict)
    """Bytes of the packed weights that smaller row counts need, by slot and form."""

    @cached_property
    def parts(self) -> Mapping[str, tuple[TensorNode, ...]]:
        """The plain nodes of each fused one, by its name."""
        nodes = {node.name: node for node in self.graph.ops}
        return {
            fusion.node.name: tuple(nodes[part] for part in fusion.parts)
            for group in self.slotting.groups
            for fusion in group
        }

    def at(self, rows: int, held: Held) -> Assigned | None:
        """The best at a row count; None where that needs packed forms beyond those `held` that it may not have.

        Weights have the packed forms that were wanted at the first that was asked for, and at the second others where
        that pays, there is room, and the policy allows as many; at all further ones no more than these.
        """
        found = self._tried.pop(rows, None) or self._best(rows, held)
        self._tried.clear()
        if found is None:
            return None
        self._found[rows] = found
        self._forms |= self._new_forms(found)
        slots = self.slotting.slots(found.numbers)
        kernels = {node.name: found.options[slot].kernel for slot, members in slots.members.items() for node in members}
        return Assigned(tuple(self.slotting.kept(found.numbers)), kernels, found.us)

    def most(self, counts: Sequence[int], held: Held) -> int:
        """Of row counts, ascending, the one that steps had better have at most.

        It is the largest, unless that needs packed forms that weights may not have: then the one that takes the least
        time a row, and a second form has to pay there, too.
        """
        best, taken = math.inf, counts[0]
        for rows in reversed(counts):
            found = self._best(rows, held)
            if found is None:
                continue
            self._tried[rows] = found
            if rows == counts[-1]:
                return rows
            asked = all(is_held(option, held) for option in found.options.values())
            us = found.us / rows / (1.0 if asked else PAYS)
            if us < best:
                best, taken = us, rows
        return taken

    def _best(self, rows: int, held: Held) -> _Found | None:
        known = len(self._found)
        asked = _At(self, Options(self.graph, self.selector, self.fusing, self.parts, rows, held))
        below = self._found.get(max((other for other in self._found if other < rows), default=0))
        found = asked.search(below.numbers if below else frozenset(), Within(held=known > 1))
        if known == 0 and not self._fits(found):
            found = asked.search(found.numbers, Within(lightest=True))
        if known == 1 and not all(is_held(option, held) for option in found.options.values()):
            smaller = asked.search(found.numbers, Within(held=True))
            found = smaller if smaller.us * PAYS <= found.us or not self._may_have(found, held, rows) else found
        if known > 1 and below and (same := asked.again(below)):
            alike = same.us <= ALIKE * found.us and same.error <= found.error
            found = same if alike else found
        return found if not known or self._may_have(found, held, rows) else None

    def _new_forms(self, found: _Found) -> dict[tuple[int, str], int]:
        """Bytes of the packed weights that no smaller row count needs."""
        members = self.slotting.slots(found.numbers).members
        return {
            key: len(members[slot]) * option.nbytes
            for slot, option in found.options.items()
            if option.form is not None and (key := (slot, option.form[1])) not in self._forms
        }

    def _fits(self, found: _Found) -> bool:
        """Whether all packed weights have room on the device; what a device does not say counts as none.

        Host memory that nobody stated counts as enough: a system pages.
        """
        device = self.selector.offers.device
        room = device.memory or (math.inf if device.platform.host_memory else 0)
        needed = sum(self._forms.values()) + sum(self._new_forms(found).values())
        return needed <= MOST_MEMORY * room

    def _may_have(self, found: _Found, held: Held, rows: int) -> bool:
        """Whether there is room for all packed forms that are not held, and the policy allows as many of a weight.

        Those of a rule that leaves no choice are had all the same.
        """
        limit = self.selector.policy.document.weights.copies or math.inf
        members = self.slotting.slots(found.numbers).members
        new = [
            option.form[0]
            for slot, option in found.options.items()
            if option.form is not None and not is_held(option, held) and self._is_open(members[slot][0], rows)
        ]
        many = (len(held.get(weight, ())) >= limit for weights in new for weight in weights)
        return not new or (self._fits(found) and not any(many))

    def _is_open(self, node: TensorNode, rows: int) -> bool:
        """Whether the policy leaves a node, or some part of a fused one, to be chosen here."""
        own = node.rows_at(rows)
        parts = self.parts.get(node.name)
        if parts is None:
            return self.selector.is_open(node, own)
        return not self.fusing.forced(node, own) and any(self.selector.is_open(part, own) for part in parts)


@dataclass
class _At:
    """The search at one row count."""

    auto: Auto
    options: Options
    _factors: dict[Within, dict[object, Factor]] = field(default_factory=dict)
    _eliminated: Eliminations = field(default_factory=dict)

    def search(self, start: frozenset[int], within: Within) -> _Found:
        """From a set of kinds of fusions to the best: captured, unless what no capture holds is worth its launches."""
        if not is_captured(self.device, self.options.rows, capturable=True):
            return self._search(start, within)
        captured = self._search(start, replace(within, captured=True))
        if step_time(0.0, captured.launches, False, self.ceilings) >= captured.us:
            return captured
        eager = self._search(captured.numbers, within)
        return eager if eager.is_better(captured) else captured

    def _search(self, start: frozenset[int], within: Within) -> _Found:
        """To the best that single steps lead to; forced ones are always among them."""
        groups = self.auto.slotting.groups
        solve = cache(partial(self._solve, within=within))
        kinds = range(len(groups))
        forced = frozenset(n for n in kinds if self.auto.fusing.forced(groups[n][0].node, self.options.rows))
        # A rule that names a fused op is not asked whether that pays.
        possible = [number for number in kinds if number in forced or self._may_pay(number, within)]
        best, improved = solve(start & frozenset(possible) | forced), True
        while improved:
            improved = False
            for number in possible:
                for numbers in self._steps(best.numbers, number, possible):
                    if forced <= numbers and solve(numbers).is_better(best):
                        best, improved = solve(numbers), True
        return best

    def again(self, found: _Found) -> _Found | None:
        """What was found at another row count, at this one; None where it cannot be had."""
        slots = self.auto.slotting.slots(found.numbers)
        same: dict[int, Option] = {}
        for slot, members in slots.members.items():
            options = self.options.of(members[0], Within(held=True))
            known = [option for option in options if option.kernel == found.options[slot].kernel]
            if not known:
                return None
            same[slot] = known[0]
        own = sum(len(slots.members[slot]) * option.us + option.once for slot, option in same.items())
        between = sum(count * link.us(same, self.options.convert) for link, count in slots.links.items())
        return self._made_of(found.numbers, same, own + between)

    def _steps(self, numbers: frozenset[int], number: int, possible: Sequence[int]) -> Iterator[frozenset[int]]:
        """A kind of fusion put in place of those that it overlaps; or left out, or replaced by smaller ones."""
        slotting = self.auto.slotting
        if number not in numbers:
            yield numbers - {other for other in numbers if slotting.overlap(number, other)} | {number}
            return
        yield numbers - {number}
        smaller: set[int] = set()
        for other in possible:
            inside = other != number and slotting.contains(number, other)
            if inside and not any(slotting.overlap(other, taken) for taken in smaller):
                smaller.add(other)
        if smaller:
            yield numbers - {number} | smaller

    def _may_pay(self, number: int, within: Within) -> bool:
        """Whether a kind of fusion has a kernel that is not slower by far than its parts."""
        node = self.auto.slotting.groups[number][0].node
        fused = self.options.of(node, within)
        parts = (self.options.of(part, within) for part in self.auto.parts[node.name])
        apart = sum(min((option.us + option.once for option in options), default=math.inf) for options in parts)
        return any(option.us + option.once <= FAR * apart for option in fused)

    def _solve(self, numbers: frozenset[int], within: Within) -> _Found:
        """The best options for a set of kinds of fusions."""
        slots = self.auto.slotting.slots(numbers)
        options = {slot: self.options.of(members[0], within) for slot, members in slots.members.items()}
        # A slot's options are the same whatever else is fused, and so are the times of what joins the same slots.
        known, factors = self._factors.setdefault(within, {}), []
        for slot, members in slots.members.items():
            if slot not in known:
                known[slot] = own_times(slot, options[slot], len(members))
            factors.append(known[slot])
        for link, count in slots.links.items():
            if (link, count) not in known:
                known[link, count] = link_times(link, count, options, self.options.convert)
            factors.append(known[link, count])
        picked, us = minimise(factors, self._eliminated)
        return self._made_of(numbers, {slot: options[slot][index] for slot, index in picked.items()}, us)

    def _made_of(self, numbers: frozenset[int], options: Mapping[int, Option], us: float) -> _Found:
        members = self.auto.slotting.slots(numbers).members
        counted = [(len(members[slot]), option) for slot, option in options.items()]
        launches = sum(count * option.launches for count, option in counted)
        captured = is_captured(self.device, self.options.rows, all(option.capturable for _, option in counted))
        error = sum(count * option.error for count, option in counted)
        return _Found(numbers, options, step_time(us, launches, captured, self.ceilings), error, launches)

    @property
    def device(self) -> Device:
        return self.auto.selector.offers.device

    @property
    def ceilings(self) -> Ceilings:
        return self.auto.selector.predictor.ceilings
