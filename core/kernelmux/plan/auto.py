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

from kernelmux.contract.packed import packed_form
from kernelmux.errors import PlanError
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import Graph, TensorNode
from kernelmux.graph.rewrite import Fusion
from kernelmux.plan.assign import Factor, Option, Wire, minimise, own_times, undominated, wire_times
from kernelmux.plan.budget import added_error
from kernelmux.plan.fusion import Fusing
from kernelmux.plan.selection import Held, Selector
from kernelmux.plan.slots import Link, Slotting

EAGER = 2000.0
"""Microseconds that Python's launches cost a step of few rows which one kernel keeps from being captured."""
FEW_ROWS = 64
"""Rows up to which steps are captured, where nothing forbids it; above, a step's work outlasts its launches."""
MOST_MEMORY = 0.8
"""Share of the device's memory that packed weights may take: the rest is the cache's."""
FORBIDDING = 1e9
"""Microseconds by which whatever must not be is told from all else."""
ALIKE = 1.01
"""What fewer rows run is kept where the best is no faster than by so much, and no more exact: fewer changes are fewer
buckets."""
FAR = 3.0
"""A fused kernel that takes so many times as long as its parts is not tried."""
LIGHT = 1.25
"""Where not everything fits, packed weights may be so many times as large as the smallest."""
PAYS = 0.9
"""A second packed form of a weight is taken where the whole then takes no more than this share of its time."""


@dataclass(frozen=True)
class Assigned:
    """What to run at one row count: the fusions kept, and the kernel of every node by name."""

    fusions: tuple[Fusion, ...]
    kernels: Mapping[str, str]


@dataclass(frozen=True)
class _Found:
    numbers: frozenset[int]
    options: Mapping[int, Option]
    """By slot."""
    us: float
    error: float
    """What all nodes together add."""

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

    def at(self, rows: int, held: Held) -> Assigned:
        """The best at a row count.

        Weights have the packed forms that were wanted at the first that was asked for, and at the second others where
        that pays and there is room; at all further ones no more than these, which are `held`.
        """
        asked, known = _At(self, rows), len(self._found)
        below = self._found.get(max((other for other in self._found if other < rows), default=0))
        found = asked.search(below.numbers if below else frozenset(), held if known > 1 else {})
        if known == 0 and not self._fits(found):
            found = asked.search(found.numbers, {}, lightest=True)
        if known == 1 and any(not is_held(option, held) for option in found.options.values()):
            smaller = asked.search(found.numbers, held)
            found = smaller if smaller.us * PAYS <= found.us or not self._fits(found) else found
        if known > 1 and below and (same := asked.again(below, held)):
            alike = same.us <= ALIKE * found.us and same.error <= found.error
            found = same if alike else found
        self._found[rows] = found
        self._forms |= self._new_forms(found)
        slots = self.slotting.slots(found.numbers)
        kernels = {node.name: found.options[slot].kernel for slot, members in slots.members.items() for node in members}
        return Assigned(tuple(self.slotting.kept(found.numbers)), kernels)

    def _new_forms(self, found: _Found) -> dict[tuple[int, str], int]:
        """Bytes of the packed weights that no smaller row count needs."""
        members = self.slotting.slots(found.numbers).members
        return {
            key: len(members[slot]) * option.nbytes
            for slot, option in found.options.items()
            if option.form is not None and (key := (slot, option.form[1])) not in self._forms
        }

    def _fits(self, found: _Found) -> bool:
        """Whether all packed weights have room on the device, where that is known."""
        memory = self.selector.offers.device.memory
        needed = sum(self._forms.values()) + sum(self._new_forms(found).values())
        return not memory or needed <= MOST_MEMORY * memory


@dataclass
class _At:
    """The search at one row count."""

    auto: Auto
    rows: int
    _options: dict[tuple[str, bool, bool], list[Option]] = field(default_factory=dict)
    _factors: dict[tuple[bool, bool], dict[object, Factor]] = field(default_factory=dict)
    _converting: dict[tuple[Value, str, str], float] = field(default_factory=dict)

    def search(self, start: frozenset[int], held: Held, lightest: bool = False) -> _Found:
        """From a set of kinds of fusions to the best that single steps lead to; forced ones are always among them."""
        groups = self.auto.slotting.groups
        solve = cache(partial(self._solve, held=held, lightest=lightest))
        possible = [number for number in range(len(groups)) if self._may_pay(number, held, lightest)]
        forced = frozenset(n for n in possible if self.auto.fusing.forced(groups[n][0].node, self.rows))
        best, improved = solve(start & frozenset(possible) | forced), True
        while improved:
            improved = False
            for number in possible:
                for numbers in self._steps(best.numbers, number, possible):
                    if forced <= numbers and solve(numbers).is_better(best):
                        best, improved = solve(numbers), True
        return best

    def again(self, found: _Found, held: Held) -> _Found | None:
        """What was found at another row count, at this one; None where it cannot be had."""
        slots = self.auto.slotting.slots(found.numbers)
        same: dict[int, Option] = {}
        for slot, members in slots.members.items():
            options = self.options(members[0], held, False)
            known = [option for option in options if option.kernel == found.options[slot].kernel]
            if not known:
                return None
            same[slot] = known[0]
        own = sum(len(slots.members[slot]) * option.us + option.once for slot, option in same.items())
        between = sum(self._wire(link, count).us(same) for link, count in slots.links.items())
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

    def _may_pay(self, number: int, held: Held, lightest: bool) -> bool:
        """Whether a kind of fusion has a kernel that is not slower by far than its parts."""
        node = self.auto.slotting.groups[number][0].node
        fused = self.options(node, held, lightest)
        parts = (self.options(part, held, lightest) for part in self.auto.parts[node.name])
        apart = sum(min((option.us + option.once for option in options), default=math.inf) for options in parts)
        return any(option.us + option.once <= FAR * apart for option in fused)

    def _solve(self, numbers: frozenset[int], held: Held, lightest: bool) -> _Found:
        """The best options for a set of kinds of fusions."""
        slots = self.auto.slotting.slots(numbers)
        options = {slot: self.options(members[0], held, lightest) for slot, members in slots.members.items()}
        # A slot's options are the same whatever else is fused, and so are the times of what joins the same slots.
        known, factors = self._factors.setdefault((bool(held), lightest), {}), []
        for slot, members in slots.members.items():
            if slot not in known:
                known[slot] = own_times(slot, options[slot], len(members))
            factors.append(known[slot])
        for link, count in slots.links.items():
            if (link, count) not in known:
                known[link, count] = wire_times(self._wire(link, count), options)
            factors.append(known[link, count])
        picked, us = minimise(factors)
        return self._made_of(numbers, {slot: options[slot][index] for slot, index in picked.items()}, us)

    def _made_of(self, numbers: frozenset[int], options: Mapping[int, Option], us: float) -> _Found:
        members = self.auto.slotting.slots(numbers).members
        return _Found(numbers, options, us, sum(len(members[slot]) * option.error for slot, option in options.items()))

    def _wire(self, link: Link, count: int) -> Wire:
        stored = link.value.format
        convert = partial(self.convert, link.value)
        return Wire(link.writer, link.readers, stored, count, convert, stored if link.kept else "")

    def options(self, node: TensorNode, held: Held, lightest: bool) -> list[Option]:
        """What a slot may get, by one of its nodes: the more exact first, so that equals are won by them."""
        key = node.name, bool(held), lightest
        if key not in self._options:
            options = self._made(node)
            least = min((option.nbytes for option in options), default=0) if lightest else math.inf
            light = (option for option in options if option.nbytes <= LIGHT * least)
            self._options[key] = undominated([_priced(option, held) for option in light])
        return self._options[key]

    def _made(self, node: TensorNode) -> list[Option]:
        auto, own = self.auto, node.rows_at(self.rows)
        if (parts := auto.parts.get(node.name)) is None:
            candidates = auto.selector.candidates(node, own)
            if not candidates:
                # It raises, with every refusal.
                auto.selector.choose(node, own)
        else:
            candidates = auto.fusing.candidates(node, own, parts)
        kept = any(value.name in auto.graph.outputs for value in node.outputs)
        captured = auto.selector.offers.device.platform.captures and self.rows <= FEW_ROWS
        made = []
        errors = {name: added_error(kernel, node) for name, kernel in candidates}
        for name, kernel in sorted(candidates, key=lambda named: (errors[named[0]], named[0])):
            reads, writes = kernel.inputs(node), kernel.outputs(node)
            made.append(
                Option(
                    name,
                    auto.selector.predict(name, kernel, node, own).us,
                    tuple(map(tuple, reads)),
                    tuple(map(tuple, writes)),
                    joins=kernel.joins(node),
                    strided=kernel.strided,
                    form=(form := packed_form(node, name, kernel)),
                    nbytes=kernel.packed_bytes(node) if form else 0,
                    once=0.0 if kernel.capturable or not captured else EAGER,
                    error=errors[name],
                )
            )
        if kept:
            # What the graph hands back is not rounded on its way.
            stated = [value.format for value in node.outputs]
            made = [o for o in made if all(f in w for f, w in zip(stated, o.writes, strict=True))] or made
        return made

    def convert(self, value: Value, source: str, target: str) -> float:
        """Predicted microseconds of a conversion; infinite where nobody has one."""
        key = value, source, target
        if key not in self._converting:
            x, y = (Value(f"x.{end}", value.shape, end) for end in (source, target))
            node = TensorNode(name="convert", op="convert", inputs=(x,), outputs=(y,))
            rows = node.rows_at(self.rows)
            try:
                choice = self.auto.selector.choose(node, rows)
                self._converting[key] = self.auto.selector.predict(choice.name, choice.kernel, node, rows).us
            except PlanError:
                self._converting[key] = math.inf
        return self._converting[key]


def _priced(option: Option, held: Held) -> Option:
    """The option at a price that is paid only where there is no other, if it packs weights once more."""
    return option if is_held(option, held) else replace(option, once=option.once + FORBIDDING)


def is_held(option: Option, held: Held) -> bool:
    """Whether an option needs no further packed form of a weight of which there is one."""
    form = option.form
    return form is None or all(form in held.get(weight, {form}) for weight in form[0])
