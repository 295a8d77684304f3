"""Attention of many queries: a lane is a query, so that nothing is added across lanes, and a key's numbers are spread.

Tiles in memory have a query a column, two vectors side by side, for each of a tile's pairs of vectors: queries and sums
[pairs, columns, 2 lanes], scores and then their powers [pairs, KEYS, 2 lanes]. Keys, and values after them, are
[KEYS, columns] of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from kernelmux_numba.attention import QUERIES, Shape
from kernelmux_numba.code.cached import Heads, turned
from kernelmux_numba.code.few_queries import capped, factor_of, finite, width_of
from kernelmux_numba.code.powers import larger, power
from kernelmux_numba.code.vectors import FLOAT, INTEGER, WORD, Vectors, loop
from kernelmux_numba.target import Target

KEYS = 64
"""Keys of a tile."""


def at_once(target: Target) -> int:
    """Rows of a product that are made at once, two vectors each: their sums stay in registers."""
    return 8 if target.lanes == 16 else 4


def taken(shape: Shape) -> Callable[..., None]:
    """(addresses, to): as many queries as a vector has lanes, scaled, become lanes; `to` has rows of two vectors."""

    def lay(v: Vectors, addresses: ir.Value, to: ir.Value) -> None:
        heads = Heads(v, "f32", shape.dim)
        rows = [v.load(v.at(addresses, 8 * lane), WORD, 8) for lane in range(v.lanes)]
        for number in range(heads.count):
            vectors = turned(v, [heads.stored(row, number) for row in rows])
            for lane, vector in enumerate(vectors):
                scaled = v.builder.fmul(vector, v.constant(factor_of(shape)))
                v.store(scaled, v.at(to, 8 * v.lanes * (number * v.lanes + lane)))

    return lay


def widened(shape: Shape) -> Callable[..., None]:
    """(offsets, cache, scales, count, to): so many keys or values, by their scales where they have any."""

    def lay(v: Vectors, offsets: ir.Value, cache: ir.Value, scales: ir.Value, count: ir.Value, to: ir.Value) -> None:
        b, heads = v.builder, Heads(v, shape.format, shape.dim)

        def key(index: ir.Value) -> Sequence[ir.Value]:
            address = b.add(cache, v.load(b.add(offsets, b.mul(index, WORD(8))), WORD, 8))
            row = b.add(to, b.mul(index, WORD(4 * v.lanes * heads.count)))
            if shape.format == "fp8_row":
                scale = v.all_lanes(v.load(b.add(scales, b.mul(index, WORD(4))), FLOAT, 4))
            for number in range(heads.count):
                vector = heads.stored(address, number)
                if shape.format == "fp8_row":
                    vector = b.fmul(vector, scale)
                v.store(vector, v.at(row, 4 * v.lanes * number))
            return []

        loop(b, count, [], key)

    return lay


def scored(shape: Shape) -> Callable[..., None]:
    """(queries, keys, scores): two vectors of queries by `at_once` keys."""

    def lay(v: Vectors, queries: ir.Value, keys: ir.Value, scores: ir.Value) -> None:
        rows, width = at_once(v.target), 4 * width_of(v.target, shape.dim)
        zeros = [v.constant(0.0)] * (2 * rows)
        sums = _product(v, queries, (keys, 4, width), WORD(shape.dim), zeros)
        for number, sum_ in enumerate(sums):
            v.store(sum_, v.at(scores, 4 * v.lanes * number))

    return lay


def mixed(shape: Shape) -> Callable[..., None]:
    """(weights, values, count, sums, factors): `at_once` columns of two vectors of sums, by a factor a lane."""

    def lay(
        v: Vectors, weights: ir.Value, values: ir.Value, count: ir.Value, sums: ir.Value, factors: ir.Value
    ) -> None:
        b, rows, width = v.builder, at_once(v.target), 4 * width_of(v.target, shape.dim)
        factor = [v.load(v.at(factors, 4 * v.lanes * half), v.floats) for half in range(2)]
        places = [v.at(sums, 4 * v.lanes * number) for number in range(2 * rows)]
        before = [b.fmul(v.load(at, v.floats), factor[number % 2]) for number, at in enumerate(places)]
        for sum_, at in zip(_product(v, weights, (values, width, 4), count, before), places, strict=True):
            v.store(sum_, at)

    return lay


def _product(
    v: Vectors, left: ir.Value, right: tuple[ir.Value, int, int], count: ir.Value, start: Sequence[ir.Value]
) -> Sequence[ir.Value]:
    """Sums over so many of two vectors by some numbers: `right` is where these are, and how far apart.

    In bytes: from one term of the sums to the next, and from one number of a term to the next.
    """
    b, (numbers, step, apart) = v.builder, right

    def term(index: ir.Value, *sums: ir.Value) -> Sequence[ir.Value]:
        found = list(sums)
        at = b.add(left, b.mul(index, WORD(8 * v.lanes)))
        pair = [v.load(v.at(at, 4 * v.lanes * half), v.floats) for half in range(2)]
        here = b.add(numbers, b.mul(index, WORD(step)))
        for number in range(len(found) // 2):
            factor = v.all_lanes(v.load(v.at(here, apart * number), FLOAT, 4))
            for half in range(2):
                found[2 * number + half] = v.fma(pair[half], factor, found[2 * number + half])
        return found

    return loop(b, count, start, term)


def weighed(shape: Shape) -> Callable[..., None]:
    """(scores, count, first key, seen, state): two vectors of queries' scores of so many keys become powers of two.

    `seen` has each query's last key, and QUERIES apart its first. The state is, likewise apart, the queries' maxima,
    their sums, and by what earlier sums are to be multiplied.
    """

    def lay(v: Vectors, scores: ir.Value, count: ir.Value, start: ir.Value, seen: ir.Value, state: ir.Value) -> None:
        b, size = v.builder, 4 * v.lanes
        last, first = (
            [v.load(v.at(seen, 4 * QUERIES * which + size * half), v.integers) for half in range(2)]
            for which in range(2)
        )
        state_at = [[v.at(state, 4 * QUERIES * which + size * half) for half in range(2)] for which in range(3)]

        def peaks(index: ir.Value, *most: ir.Value) -> Sequence[ir.Value]:
            at = b.add(scores, b.mul(index, WORD(2 * size)))
            key = v.all_lanes(b.trunc(b.add(start, index), INTEGER))
            found = []
            for half in range(2):
                here = capped(b, shape, v.load(v.at(at, size * half), v.floats))
                sees = b.and_(b.icmp_signed("<=", key, last[half]), b.icmp_signed(">=", key, first[half]))
                here = b.select(sees, here, v.constant(float("-inf")))
                v.store(here, v.at(at, size * half))
                found.append(larger(b, here, most[half]))
            return found

        before = [v.load(at, v.floats) for at in state_at[0]]
        most = loop(b, count, before, peaks)
        base = [finite(b, peak) for peak in most]

        def raised(index: ir.Value, *totals: ir.Value) -> Sequence[ir.Value]:
            at = b.add(scores, b.mul(index, WORD(2 * size)))
            found = []
            for half in range(2):
                place = v.at(at, size * half)
                weights = power(b, b.fsub(v.load(place, v.floats), base[half]))
                v.store(weights, place)
                found.append(b.fadd(totals[half], weights))
            return found

        shrunk = [power(b, b.fsub(*pair)) for pair in zip(before, base, strict=True)]
        starts = [b.fmul(v.load(at, v.floats), by) for at, by in zip(state_at[1], shrunk, strict=True)]
        totals = loop(b, count, starts, raised)
        for places, vectors in zip(state_at, (most, totals, shrunk), strict=True):
            for at, vector in zip(places, vectors, strict=True):
                v.store(vector, at)

    return lay


def divided(shape: Shape, normal: bool) -> Callable[..., None]:
    """(sums, totals, to): a vector of queries' sums by their sums of powers (as they are, if not `normal`).

    `to` has a row of whole vectors for each.
    """

    def lay(v: Vectors, sums: ir.Value, totals: ir.Value, to: ir.Value) -> None:
        b, count = v.builder, width_of(v.target, shape.dim) // v.lanes
        over = b.fdiv(v.constant(1.0), v.load(totals, v.floats))
        for number in range(count):
            at = v.at(sums, 8 * v.lanes * v.lanes * number)
            rows = [v.load(v.at(at, 8 * v.lanes * lane), v.floats) for lane in range(v.lanes)]
            for lane, vector in enumerate(turned(v, [b.fmul(row, over) if normal else row for row in rows])):
                v.store(vector, v.at(to, 4 * v.lanes * (lane * count + number)))

    return lay
