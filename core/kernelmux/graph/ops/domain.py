"""The domain of an op: what its kernels may be given, as data, and points of it.

Enters: an op's choices and extents, with what real models use. Leaves: points that cover all pairs of choices and both
sides of every border of an extent; random points; smaller ones than a point. A point is a value for each axis.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernelmux.graph.ops.cases import Case

Point = Mapping[str, Any]
"""A value for each axis of a domain."""

Feature = tuple[str, Any]
"""What a point has: a value of an axis, a group that it is of, or a third of an extent's range."""

BLIND: frozenset[Feature] = frozenset({("values", "zeros"), ("values", "denormals"), ("padding", "all")})
"""Of these a case tells nothing else: whatever the size or attribute is, results are zeros, or nothing is done."""
MOST = 2**18
"""Of `work`, how much a case has unless one extent alone takes more: some milliseconds in float64."""
FEW = 2
"""Values that a choice has at most for each border of each extent to occur with each of them."""
TRIES = 4
"""Points that are tried for each that is kept."""


@dataclass(frozen=True)
class Extent:
    """Whole numbers from `low` to `high`; `known` are those of real models that lie on no border."""

    low: int
    high: int
    known: tuple[int, ...] = ()
    counts: tuple[int, ...] = (1, 3)
    """How many of a power of two kernels block by."""
    plain: int = 0
    """What the plainest point has; the lowest unless that is stated."""

    @cached_property
    def borders(self) -> tuple[int, ...]:
        """Both ends, `known`, and of every power of two, and of `counts` of them, the last in and the first beyond."""
        blocks = (count << shift for shift in range(self.high.bit_length()) for count in self.counts)
        sides = {side for block in blocks for side in (block, block + 1)}
        inside = (side for side in (*sides, *self.known, self.plain) if self.low <= side <= self.high)
        return tuple(sorted({self.low, self.high, *inside}))

    def third(self, number: int) -> str:
        """Where a number is between the ends: `short`, `middle` or `long`, by its logarithm."""
        share = math.log((number + 1) / (self.low + 1)) / math.log((self.high + 1) / (self.low + 1))
        return ("short", "middle", "long")[min(2, int(3 * share))]


@dataclass(frozen=True)
class Domain:
    """What an op's kernels may be given. Of each choice the first value is the plainest."""

    case: Callable[[str, Point], Case]
    """Makes a case of a point, under a label."""
    choices: Mapping[str, tuple[Any, ...]]
    """Attributes, formats and spreads of values: all pairs of them are covered."""
    extents: Mapping[str, Extent]
    work: Callable[[Point], int]
    """Elements held and a share of those multiplied, about: what a case of the point takes."""
    holds: Callable[[Point], bool] = lambda point: True
    """Whether a point's values go together."""
    groups: Mapping[str, tuple[str, str, Callable[[Any], Any]]] = field(default_factory=dict)
    """Values of a choice that are alike to an extent, `(extent, choice, group)`: its borders occur with each group."""

    @cached_property
    def plainest(self) -> Point:
        least = {name: extent.plain or extent.low for name, extent in self.extents.items()}
        return {**{name: values[0] for name, values in self.choices.items()}, **least}

    @cached_property
    def axes(self) -> Mapping[str, tuple[Any, ...]]:
        """Every axis with the values that are drawn for it."""
        return {**self.choices, **{name: extent.borders for name, extent in self.extents.items()}}

    def features(self, point: Point) -> list[Feature]:
        """What a point has, in a fixed order."""
        found = list(point.items())
        found += [(name, group(point[choice])) for name, (_, choice, group) in self.groups.items()]
        return found + [(f"{name}'s range", extent.third(point[name])) for name, extent in self.extents.items()]

    def having(self, feature: Feature) -> tuple[str, tuple[Any, ...]]:
        """The axis that a feature is about, and the values that have it."""
        name, wanted = feature
        if name in self.axes:
            return name, (wanted,)
        if name in self.groups:
            _, choice, group = self.groups[name]
            return choice, tuple(value for value in self.choices[choice] if group(value) == wanted)
        name = name.removesuffix("'s range")
        extent = self.extents[name]
        return name, tuple(value for value in extent.borders if extent.third(value) == wanted)

    @cached_property
    def wanted(self) -> Mapping[tuple[Feature, Feature], None]:
        """Every pair of features that is to occur where both go together within `MOST`; one with itself does anyhow.

        Two choices: each pair of values. An extent and a choice of at most `FEW` values, or a group: each border with
        each value. An extent's ranges with each other's, and with each value of other choices.
        """
        choices: dict[str, list[Feature]]
        choices = {name: [(name, value) for value in values] for name, values in self.choices.items()}
        borders = {name: [(name, value) for value in extent.borders] for name, extent in self.extents.items()}
        ranges = {
            name: [(f"{name}'s range", third) for third in dict.fromkeys(map(extent.third, extent.borders))]
            for name, extent in self.extents.items()
        }
        switches = [features for features in choices.values() if len(features) <= FEW]
        grouped = {
            name: [(name, value) for value in dict.fromkeys(map(group, self.choices[choice]))]
            for name, (_, choice, group) in self.groups.items()
        }
        pairs: list[tuple[list[Feature], list[Feature]]] = [
            *((borders[extent], grouped[name]) for name, (extent, *_) in self.groups.items()),
            *itertools.product(borders.values(), switches),
            *itertools.product(ranges.values(), (each for each in choices.values() if len(each) > FEW)),
            *itertools.combinations(ranges.values(), 2),
            *itertools.combinations(choices.values(), 2),
        ]
        singles = [(one, one) for one in itertools.chain(*borders.values(), *choices.values())]
        return dict.fromkeys([*(pair for two in pairs for pair in itertools.product(two[0], two[1])), *singles])


def covering(domain: Domain) -> list[Point]:
    """A small set of points with every pair that is wanted and goes together; always the same ones.

    Greedily: each point has a pair that is missing, and of a few such the most others that are.
    """
    source = random.Random(0)
    missing, points = dict(domain.wanted), []
    while missing:
        pair = next(iter(missing))
        best: Point | None = None
        met: set[tuple[Feature, Feature]] = set()
        for _ in range(TRIES):
            point = complete(domain, pair, source)
            if point is None:
                break
            its = pairs(domain, point) & missing.keys()
            if best is None or len(its) > len(met):
                best, met = point, its
        for one in (pair, *met):
            missing.pop(one, None)
        if best is not None:
            points.append(best)
    return points


def pairs(domain: Domain, point: Point) -> set[tuple[Feature, Feature]]:
    """The pairs of features that a case of the point tells of, in both orders."""
    features = domain.features(point)
    blind = BLIND.intersection(point.items())
    return {(one, other) for one in features for other in features if not blind or blind & {one, other}}


def complete(domain: Domain, features: Sequence[Feature], source: random.Random) -> Point | None:
    """A random point within `MOST` that has these features; None where there is none.

    What one feature alone takes is no matter: then all else is as plain as can be.
    """
    point = _sound(domain, features, source)
    if point is None:
        return None
    most = max(MOST, domain.work(point))
    held = {name for name, _ in map(domain.having, features)}
    rest = [name for name in domain.axes if name not in held]
    source.shuffle(rest)
    for name in rest:
        value = source.choice(domain.axes[name])
        changed = {**point, name: value}
        if (name, value) not in BLIND and domain.holds(changed) and domain.work(changed) <= most:
            point = changed
    return point


def _sound(domain: Domain, features: Sequence[Feature], source: random.Random) -> Point | None:
    """The plainest point that has these features, or that with another choice; with random values of them, if any."""
    names, options = zip(*map(domain.having, dict.fromkeys(features)), strict=True)
    if len(set(names)) < len(names):
        return None
    drawn = tuple(map(source.choice, options))
    # Of extents a few will do.
    free = (
        *((name, v[1:]) for name, v in domain.choices.items()),
        *((n, (*e.borders[1:3], *e.borders[::6])) for n, e in domain.extents.items()),
    )
    rest = [(name, value) for name, values in free if name not in names for value in values]
    for others in ((), *((other,) for other in rest)):
        for values in (drawn, *itertools.islice(itertools.product(*options), 20)):
            point = {**domain.plainest, **dict(zip(names, values, strict=True)), **dict(others)}
            if domain.holds(point) and (len(names) == 1 or domain.work(point) <= MOST):
                return point
    return None


def any_point(domain: Domain, source: random.Random) -> Point:
    """A random point within `MOST`, one in 16 within sixteen times that; of extents a border as often as any number."""
    point, most = domain.plainest, MOST * source.choice((*[1] * 15, 16))
    for name in source.sample([*domain.axes], len(domain.axes)):
        extent = domain.extents.get(name)
        if extent is None or source.random() < 0.5:
            value = source.choice(domain.axes[name])
        else:
            value = round((extent.low + 1) * ((extent.high + 1) / (extent.low + 1)) ** source.random()) - 1
        changed = {**point, name: value}
        if domain.holds(changed) and domain.work(changed) <= most:
            point = changed
    return point


def smaller(domain: Domain, point: Point) -> Iterator[Point]:
    """Points that differ from one in a single axis and are plainer, or smaller, there: the largest steps first."""
    for name, values in domain.choices.items():
        for plainer in values[: values.index(point[name])]:
            yield {**point, name: plainer}
    for name, extent in domain.extents.items():
        value = point[name]
        halves = (value >> shift for shift in range(1, value.bit_length() + 1))
        for step in dict.fromkeys((value - extent.low, *halves)):
            if 0 < step <= value - extent.low:
                yield {**point, name: value - step}


def label(domain: Domain, point: Point) -> str:
    """What differs from the plainest point, and every extent: `m=4,n=33,k=768,format=Q4_K,bias`."""
    words = [f"{name}={point[name]}" for name in domain.extents]
    for name in domain.choices:
        value = point[name]
        if value != domain.plainest[name]:
            words.append(name if value is True else f"{name}={_word(value)}")
    return ",".join(words)


def _word(value: Any) -> str:
    return "+".join(dict.fromkeys(map(str, value))) if isinstance(value, tuple) else str(value)
