"""The assignment of least predicted time: an option for each slot, the conversions on the links between them counted.

Enters: slots, each of which so many alike nodes share, and links, which say who writes what whom reads. Leaves: an
option for each slot. The answer is exact and the same in any process: slots are eliminated one by one, each for every
choice of its neighbours (variable elimination), which costs little, for layers make a chain.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any, NamedTuple

from kernelmux.contract.packed import Form
from kernelmux.graph.formats import Value
from kernelmux.measure.steps import Storing
from kernelmux.plan.formats import Reader, best_format, format_read, joint_formats


@dataclass(frozen=True)
class Option:
    """A kernel that a slot may get: its time, and what it takes of inputs and outputs."""

    kernel: str
    us: float
    """Predicted microseconds of one of the slot's nodes."""
    reads: tuple[Storing, ...]
    writes: tuple[Storing, ...]
    joins: bool = False
    """Whether it writes its outputs side by side."""
    strided: bool = True
    """Whether it reads what was written so."""
    form: Form | None = None
    """The packed weights that it needs."""
    nbytes: int = 0
    """Of those, of one node."""
    once: float = 0.0
    """Microseconds that it costs the whole step, however many nodes the slot has."""
    error: float = 0.0
    """What one of the slot's nodes adds."""
    tolerates: float = 0.0
    """The rounding that its inputs may have for the sake of time."""
    launches: int = 1
    """Of one of them."""
    capturable: bool = True
    """Whether a captured step can hold it."""

    def replaces(self, other: Option) -> bool:
        """Whether whatever is done with `other` may be done with this one, in no more time."""
        sides = [(self.reads, other.reads), (self.writes, other.writes)]
        ports = [pair for mine, theirs in sides for pair in zip(mine, theirs, strict=True)]
        return (
            # In other formats a value would be stored otherwise.
            all(list(mine) == list(theirs) for mine, theirs in ports)
            and self.us + sum(max(us - theirs[format] for format, us in mine.items()) for mine, theirs in ports)
            <= other.us
            and self.once <= other.once
            and self.joins <= other.joins
            and self.strided >= other.strided
            and self.tolerates == other.tolerates
            and self.launches <= other.launches
            and self.capturable >= other.capturable
        )

    def is_faster(self, other: Option) -> bool:
        """Whether it is, of two of which neither time is more than the other's."""
        return (self.us, self.once) != (other.us, other.once)


Port = tuple[int, int]
"""A slot, and the number of one of its nodes' inputs or outputs."""


@dataclass(frozen=True)
class Link:
    """Alike values of rows and columns: who writes them, who reads them in walking order, what the graph states."""

    writer: Port | None
    """None where they are there before a step."""
    readers: tuple[Port, ...]
    value: Value
    kept: bool
    """Whether the graph hands them back, as it states them."""

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """The slots that it joins, ascending."""
        return tuple(sorted({slot for slot, _ in (*self.readers, *([self.writer] if self.writer else []))}))

    def face(self, slot: int, option: Option) -> Hashable:
        """All of an option of a slot that decides about the link."""
        ports = [port for other, port in self.readers if other == slot]
        reads = [tuple(option.reads[port].items()) for port in ports]
        writes: tuple[Hashable, ...] = ()
        if self.writer is not None and self.writer[0] == slot:
            sides = option.writes if option.joins else option.writes[self.writer[1] : self.writer[1] + 1]
            writes = (option.joins, *(tuple(side.items()) for side in sides))
        return writes, *reads, option.strided, option.tolerates

    def us(self, options: Mapping[int, Option], convert: Convert) -> float:
        """What one value takes where the slots have these options, beside their own times: conversions, and storage.

        Infinite where it is written side by side with others and somebody cannot read it so.
        """
        stated = {self.value.format: 0.0}
        costs = [options[slot].reads[port] for slot, port in self.readers] + ([stated] if self.kept else [])
        tolerated = [options[slot].tolerates for slot, _ in self.readers] + ([0.0] if self.kept else [])
        wanted = list(map(Reader, map(tuple, costs), tolerated))
        written = stated if self.writer is None else options[self.writer[0]].writes[self.writer[1]]
        if self.writer is not None and options[self.writer[0]].joins:
            if self.kept or not all(options[slot].strided for slot, _ in self.readers):
                return math.inf
            # As if what the other outputs' readers take were the same.
            fitting = joint_formats(options[self.writer[0]].writes, wanted)
            written = {format: written[format] for format in fitting}
            if not written:
                return math.inf
        stored = best_format(self.value, written, wanted)
        us, converted = written[stored], dict[str, float]()
        for formats in costs:
            target = format_read(formats, stored, converted)
            if target != stored and target not in converted:
                converted[target] = convert(self.value, stored, target)
            us += formats[target]
        return us + sum(converted.values())


Convert = Callable[[Value, str, str], float]
"""Predicted microseconds of a conversion between two formats; infinite where nobody can."""
Choice = tuple[int, ...]
Factor = tuple[tuple[int, ...], Mapping[Choice, float]]
"""Slots, and the microseconds for each choice of their options, by number."""


class Elimination(NamedTuple):
    """A slot eliminated: the factors that it was in, its best option for each choice around it, and what is left."""

    factors: Sequence[Factor]
    best: Mapping[Choice, int]
    leaves: Factor


Eliminations = dict[tuple[int, tuple[int, ...]], Elimination]
"""By slot, and the ids of its factors, which are kept with it."""


def undominated(options: Sequence[Option]) -> list[Option]:
    """The options without those that another one replaces: one before it, or a faster one. Of equals the first stays.

    The first are the more exact ones, which what is no faster does not replace, though it may take more formats.
    """
    kept: list[Option] = []
    for option in options:
        if not any(other.replaces(option) for other in kept):
            kept = [other for other in kept if not (option.replaces(other) and option.is_faster(other))] + [option]
    return kept


def own_times(slot: int, options: Sequence[Option], count: int) -> Factor:
    """What a slot's nodes take by themselves."""
    return (slot,), {(index,): count * option.us + option.once for index, option in enumerate(options)}


def link_times(link: Link, count: int, options: Mapping[int, Sequence[Option]], convert: Convert) -> Factor:
    """What alike values take, `count` of them, by what the slots get that have more than one option."""
    open_slots = tuple(slot for slot in link.slots if len(options[slot]) > 1)
    # Many options are alike to a link: it is worked out once for those, by the number of their face.
    faces: list[list[int]] = []
    first: list[list[Option]] = []
    for slot in link.slots:
        numbers: dict[Hashable, int] = {}
        faces.append([numbers.setdefault(link.face(slot, option), len(numbers)) for option in options[slot]])
        first.append([options[slot][faces[-1].index(number)] for number in numbers.values()])
    alike = itertools.product(*(range(len(seen)) for seen in first))
    picked = (dict(zip(link.slots, each, strict=True)) for each in itertools.product(*first))
    known = {face: count * link.us(each, convert) for face, each in zip(alike, picked, strict=True)}
    chosen = itertools.product(*(range(len(options[slot])) for slot in open_slots))
    # Those of a slot with one option have one face: as many choices as there are faces of all slots.
    return open_slots, {choice: known[face] for choice, face in zip(chosen, itertools.product(*faces), strict=True)}


def minimise(factors: Iterable[Factor], known: Eliminations | None = None) -> tuple[dict[int, int], float]:
    """An option for each slot, by number, and the microseconds of the whole: the least there is, the first of equals.

    Every slot has a factor of its own. What other calls have `known` of the very same factors is not done again.
    """
    left, known = list(factors), {} if known is None else known
    sizes = {slots[0]: len(times) for slots, times in left if len(slots) == 1}
    decided: list[tuple[int, tuple[int, ...], Mapping[Choice, int]]] = []
    answer = {slot: 0 for slot, size in sizes.items() if size == 1}
    alone = sum(times[0,] for slots, times in left if len(slots) == 1 and slots[0] in answer)
    left = [factor for factor in left if not (len(factor[0]) == 1 and factor[0][0] in answer)]
    sizes = {slot: size for slot, size in sizes.items() if slot not in answer}
    for slot in _in_order(left, sizes):
        mine = [factor for factor in left if slot in factor[0]]
        key = slot, tuple(map(id, mine))
        if key not in known:
            around = tuple(sorted({other for slots, _ in mine for other in slots} - {slot}))
            best, least = _eliminate(slot, around, mine, sizes)
            known[key] = Elimination(mine, best, (around, least))
        left = [*(factor for factor in left if slot not in factor[0]), known[key].leaves]
        decided.append((slot, known[key].leaves[0], known[key].best))
    for slot, around, best in reversed(decided):
        answer[slot] = best[tuple(answer[other] for other in around)]
    return answer, alone + sum(times[()] for _, times in left)


def _in_order(factors: Sequence[Factor], sizes: Mapping[int, int]) -> Iterator[int]:
    """The slots, each as soon as the fewest choices of those around it must be told apart."""
    around: dict[int, set[int]] = {slot: set() for slot in sizes}
    for slots, _ in factors:
        for slot in slots:
            around[slot].update(slots)
    choices = {slot: math.prod([sizes[other] for other in near]) for slot, near in around.items()}
    while around:
        slot = min(choices, key=choices.__getitem__)
        near = around.pop(slot) - {slot}
        del choices[slot]
        for other in near:
            around[other] = (around[other] | near) - {slot}
            choices[other] = math.prod([sizes[each] for each in around[other]])
        yield slot


def _eliminate(
    slot: int, around: tuple[int, ...], factors: Sequence[Factor], sizes: Mapping[int, int]
) -> tuple[Mapping[Choice, int], Mapping[Choice, float]]:
    """A slot's best option and its microseconds, for every choice of the slots around it."""
    best: dict[Choice, int] = {}
    least: dict[Choice, float] = {}
    order = {other: place for place, other in enumerate((*around, slot))}
    tables = []
    for slots, times in factors:
        # A getter of one place gives what stands there, of several a tuple.
        alone = len(slots) == 1
        table: Mapping[Any, float] = {key: us for (key,), us in times.items()} if alone else times
        tables.append((itemgetter(*(order[other] for other in slots)), table))
    for choice in itertools.product(*(range(sizes[other]) for other in around)):
        for index in range(sizes[slot]):
            known, us = (*choice, index), 0.0
            for pick, table in tables:
                us += table[pick(known)]
            if choice not in least or us < least[choice]:
                best[choice], least[choice] = index, us
    return best, least
