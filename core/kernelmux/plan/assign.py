"""The assignment of least predicted time: an option for each slot, the conversions on the wires between them counted.

Enters: slots, each of which so many alike nodes share, and wires, which say who writes what whom reads. Leaves: an
option for each slot. The answer is exact and the same in any process: slots are eliminated one by one, each for every
choice of its neighbours (variable elimination), which costs little, for layers make a chain.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from kernelmux.contract.packed import Form

Formats = tuple[str, ...]


@dataclass(frozen=True)
class Option:
    """A kernel that a slot may get: its time, and the formats of inputs and outputs that it takes, best first."""

    kernel: str
    us: float
    """Predicted microseconds of one of the slot's nodes."""
    reads: tuple[Formats, ...]
    writes: tuple[Formats, ...]
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

    def replaces(self, other: Option) -> bool:
        """Whether whatever is done with `other` may be done with this one, in no more time."""
        reads = zip(self.reads, other.reads, strict=True)
        writes = zip(self.writes, other.writes, strict=True)
        return (
            self.us <= other.us
            and self.once <= other.once
            and self.joins <= other.joins
            and self.strided >= other.strided
            and all(mine[0] == theirs[0] and set(mine) >= set(theirs) for mine, theirs in reads)
            and all(set(mine) >= set(theirs) for mine, theirs in writes)
        )

    def is_faster(self, other: Option) -> bool:
        """Whether it is, of two of which neither time is more than the other's."""
        return (self.us, self.once) != (other.us, other.once)


Port = tuple[int, int]
"""A slot, and the number of one of its nodes' inputs or outputs."""


@dataclass(frozen=True)
class Wire:
    """Alike values: who writes them (None: they are there, as `stored`), who reads them, and how many there are."""

    writer: Port | None
    readers: tuple[Port, ...]
    stored: str
    count: int
    convert: Callable[[str, str], float]
    """Predicted microseconds of a conversion between two formats; infinite where nobody can."""
    kept: str = ""
    """The format in which the graph hands it back, if it does."""

    def us(self, options: Mapping[int, Option]) -> float:
        """What the conversions take where the slots have these options: as few of them as a writer can make it."""
        if self.writer is not None and options[self.writer[0]].joins and self._must_be_whole(options):
            return math.inf
        wanted = [options[slot].reads[port] for slot, port in self.readers]
        wanted += [(self.kept,)] if self.kept else []
        written = (self.stored,) if self.writer is None else options[self.writer[0]].writes[self.writer[1]]
        best = min(((len(self._targets(format, wanted)), format != self.stored), format) for format in written)[1]
        return self.count * sum(self.convert(best, target) for target in self._targets(best, wanted))

    def _must_be_whole(self, options: Mapping[int, Option]) -> bool:
        return bool(self.kept) or not all(options[slot].strided for slot, _ in self.readers)

    @staticmethod
    def _targets(format: str, wanted: Sequence[Formats]) -> set[str]:
        return {formats[0] for formats in wanted if format not in formats}

    @property
    def slots(self) -> tuple[int, ...]:
        """The slots that it joins, ascending."""
        return tuple(sorted({slot for slot, _ in (*self.readers, *([self.writer] if self.writer else []))}))


Choice = tuple[int, ...]
Factor = tuple[tuple[int, ...], Mapping[Choice, float]]
"""Slots, and the microseconds for each choice of their options, by number."""


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


def wire_times(wire: Wire, options: Mapping[int, Sequence[Option]]) -> Factor:
    """What the conversions of a wire take, by what the slots get that it joins and that have more than one option."""
    fixed = {slot: options[slot][0] for slot in wire.slots}
    open_slots = tuple(slot for slot in wire.slots if len(options[slot]) > 1)
    times = {}
    for choice in itertools.product(*(range(len(options[slot])) for slot in open_slots)):
        picked = {slot: options[slot][index] for slot, index in zip(open_slots, choice, strict=True)}
        times[choice] = wire.us({**fixed, **picked})
    return open_slots, times


def minimise(factors: Iterable[Factor]) -> tuple[dict[int, int], float]:
    """An option for each slot, by number, and the microseconds of the whole: the least there is, the first of equals.

    Every slot has a factor of its own.
    """
    left = list(factors)
    sizes = {slots[0]: len(times) for slots, times in left if len(slots) == 1}
    decided: list[tuple[int, tuple[int, ...], Mapping[Choice, int]]] = []
    answer = {slot: 0 for slot, size in sizes.items() if size == 1}
    alone = sum(times[0,] for slots, times in left if len(slots) == 1 and slots[0] in answer)
    left = [factor for factor in left if not (len(factor[0]) == 1 and factor[0][0] in answer)]
    sizes = {slot: size for slot, size in sizes.items() if slot not in answer}
    for slot in _in_order(left, sizes):
        mine = [factor for factor in left if slot in factor[0]]
        around = tuple(sorted({other for slots, _ in mine for other in slots} - {slot}))
        best, least = _eliminate(slot, around, mine, sizes)
        left = [*(factor for factor in left if slot not in factor[0]), (around, least)]
        decided.append((slot, around, best))
    for slot, around, best in reversed(decided):
        answer[slot] = best[tuple(answer[other] for other in around)]
    return answer, alone + sum(times[()] for _, times in left)


def _in_order(factors: Sequence[Factor], sizes: Mapping[int, int]) -> Iterator[int]:
    """The slots, each as soon as the fewest choices of those around it must be told apart."""
    around: dict[int, set[int]] = {slot: set() for slot in sizes}
    for slots, _ in factors:
        for slot in slots:
            around[slot].update(slots)
    while around:
        slot = min(around, key=lambda slot: math.prod(sizes[other] for other in around[slot]))
        near = around.pop(slot) - {slot}
        for other in near:
            around[other] = (around[other] | near) - {slot}
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
