"""Attention of a few queries: a vector is columns of one head, so that a key is read once for all of them.

Scores, and then their powers, lie in memory as [queries, KEYS]; queries and sums as [queries, columns], the columns in
the order in which the cache is least work to read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from kernelmux_numba.attention import Shape
from kernelmux_numba.code.cached import Heads, Sums
from kernelmux_numba.code.powers import LOG2E, larger, power, splat, tanh
from kernelmux_numba.code.vectors import FLOAT, INTEGER, WORD, Vectors, loop
from kernelmux_numba.target import Target

KEYS = 128
"""Keys whose scores are held at once."""
AT_ONCE = 4
"""Queries that are multiplied by a key while it is in registers, at most."""


def blocks(group: int) -> tuple[int, int, int, int]:
    """How a group's queries are cut, as evenly as may be: so many blocks of so many, then so many of one less."""
    count = -(-group // AT_ONCE)
    most = -(-group // count)
    fewer = most * count - group
    return count - fewer, most, fewer, most - 1


def width_of(target: Target, columns: int) -> int:
    """Columns of a row of queries or sums: whole vectors."""
    return -(-columns // target.lanes) * target.lanes


def taken(shape: Shape) -> Callable[..., None]:
    """(query, to): a query, scaled, its columns in the easiest order."""

    def lay(v: Vectors, query: ir.Value, to: ir.Value) -> None:
        plain, heads = Heads(v, "f32", shape.dim), Heads(v, shape.format, shape.dim)
        vectors = [plain.stored(query, number) for number in range(heads.count)]
        for number, vector in enumerate(heads.eased(vectors)):
            v.store(v.builder.fmul(vector, v.constant(factor_of(shape))), v.at(to, 4 * v.lanes * number))

    return lay


def factor_of(shape: Shape) -> float:
    """What queries are multiplied with, so that scores are exponents of two; where they are capped, of the cap."""
    return shape.scale / shape.soft_cap if shape.soft_cap else shape.scale * LOG2E


def capped(b: ir.IRBuilder, shape: Shape, scores: ir.Value) -> ir.Value:
    """Scores as exponents of two."""
    if not shape.soft_cap:
        return scores
    return b.fmul(tanh(b, scores), splat(scores.type, shape.soft_cap * LOG2E))


def scored(shape: Shape, count: int) -> Callable[..., None]:
    """(queries, offsets, keys, scores): so many queries by as many keys as a vector has lanes."""

    def lay(v: Vectors, queries: ir.Value, offsets: ir.Value, keys: ir.Value, scores: ir.Value) -> None:
        b, heads = v.builder, Heads(v, shape.format, shape.dim)
        sums, order = [Sums(v) for _ in range(count)], Sums.order(v.lanes)
        for number in range(v.lanes):
            key = b.add(keys, v.load(v.at(offsets, 8 * order.index(number)), WORD, 8))
            columns = heads.easiest(key, 0, heads.count)
            for query, sum_ in enumerate(sums):
                found: ir.Value | None = None
                for place, column in enumerate(columns):
                    at = v.at(queries, 4 * v.lanes * (query * heads.count + place))
                    factor = v.load(at, v.floats, 4 * v.lanes)
                    found = b.fmul(factor, column) if found is None else v.fma(factor, column, found)
                sum_.add(found)
        for query, sum_ in enumerate(sums):
            v.store(sum_.total(), v.at(scores, 4 * KEYS * query))

    return lay


def weighed(shape: Shape) -> Callable[..., None]:
    """(scores, first, last, end, state, scales): a query's scores become powers of two, in the keys from first to last.

    `end` keys are whole vectors. The state is, FEW apart, the query's maximum, its sum, and by what earlier sums are to
    be multiplied. The scales are KEYS of keys, then of values, where the format has them.
    """

    def lay(
        v: Vectors, scores: ir.Value, first: ir.Value, last: ir.Value, end: ir.Value, state: ir.Value, scales: ir.Value
    ) -> None:
        b, scaled = v.builder, shape.format == "fp8_row"
        size = WORD(4 * v.lanes)
        vectors = b.udiv(end, WORD(v.lanes))
        numbers = ir.Constant(v.integers, list(range(v.lanes)))
        low, high = (v.all_lanes(b.trunc(bound, INTEGER)) for bound in (first, last))

        def peak(index: ir.Value, most: ir.Value) -> Sequence[ir.Value]:
            at = b.mul(index, size)
            here = v.load(b.add(scores, at), v.floats)
            if scaled:
                here = b.fmul(here, v.load(b.add(scales, at), v.floats))
            here = capped(b, shape, here)
            key = b.add(numbers, v.all_lanes(b.trunc(b.mul(index, WORD(v.lanes)), INTEGER)))
            seen = b.and_(b.icmp_signed(">=", key, low), b.icmp_signed("<", key, high))
            here = b.select(seen, here, v.constant(float("-inf")))
            v.store(here, b.add(scores, at))
            return [larger(b, here, most)]

        state_at = [v.at(state, 4 * shape.few(v.target) * place) for place in range(3)]
        before, sum_before = (v.load(at, FLOAT, 4) for at in state_at[:2])
        (most,) = loop(b, vectors, [v.constant(float("-inf"))], peak)
        most = larger(b, v.call(f"llvm.vector.reduce.fmax.v{v.lanes}f32", FLOAT, most), before)
        base = finite(b, most)

        def raised(index: ir.Value, total: ir.Value) -> Sequence[ir.Value]:
            at = b.mul(index, size)
            weights = power(b, b.fsub(v.load(b.add(scores, at), v.floats), v.all_lanes(base)))
            total = b.fadd(total, weights)
            if scaled:
                weights = b.fmul(weights, v.load(v.at(b.add(scales, at), 4 * KEYS), v.floats))
            v.store(weights, b.add(scores, at))
            return [total]

        (total,) = loop(b, vectors, [v.constant(0.0)], raised)
        shrunk = power(b, b.fsub(before, base))
        v.store(most, state_at[0])
        v.store(b.fadd(b.fmul(sum_before, shrunk), across(v, total)), state_at[1])
        v.store(shrunk, state_at[2])

    return lay


def finite(b: ir.IRBuilder, most: ir.Value) -> ir.Value:
    """A maximum to subtract: 0 where nothing has been seen, for -inf from -inf is NaN."""
    nothing = b.fcmp_ordered("==", most, splat(most.type, float("-inf")))
    return b.select(nothing, splat(most.type, 0.0), most)


def across(v: Vectors, vector: ir.Value) -> ir.Value:
    """The sum of the lanes, halves by halves."""
    b, step = v.builder, v.lanes // 2
    while step:
        moved = [(lane + step) % v.lanes for lane in range(v.lanes)]
        places = ir.Constant(v.integers, moved)
        vector = b.fadd(vector, b.shuffle_vector(vector, ir.Constant(v.floats, ir.Undefined), places))
        step //= 2
    return b.extract_element(vector, INTEGER(0))


def mixed(shape: Shape, count: int) -> Callable[..., None]:
    """(sums, weights, offsets, values, keys, factors): so many queries' sums by a factor each, and weighed values."""

    def lay(
        v: Vectors,
        sums: ir.Value,
        weights: ir.Value,
        offsets: ir.Value,
        values: ir.Value,
        keys: ir.Value,
        factors: ir.Value,
    ) -> None:
        heads = Heads(v, shape.format, shape.dim)
        at_once = _columns(v, count, heads.count)
        for first in range(0, heads.count, at_once):
            some = min(at_once, heads.count - first)
            _mix(v, heads, (first, some, count), sums, weights, offsets, values, keys, factors)

    return lay


def _columns(v: Vectors, count: int, most: int) -> int:
    """Vectors of columns at a time, an even number: their sums stay in registers."""
    registers = 24 if v.lanes == 16 else 12
    return min(most, max(2, registers // count // 2 * 2))


def _mix(v: Vectors, heads: Heads, cut: tuple[int, int, int], sums: ir.Value, *given: ir.Value) -> None:
    """Some vectors of columns, from a first one on, of some queries."""
    (first, some, count), (weights, offsets, values, keys, factors) = cut, given
    b = v.builder
    # A sum waits for its last product: with few of them, odd and even keys have their own.
    chains = 2 if some * count < 8 else 1

    def place(query: int, number: int) -> ir.Value:
        return v.at(sums, 4 * v.lanes * (query * heads.count + first + number))

    def add(key: ir.Value, now: list[ir.Value], chain: int) -> None:
        address = b.add(values, v.load(b.add(offsets, b.mul(key, WORD(8))), WORD, 8))
        columns = heads.easiest(address, first, some)
        for query in range(count):
            at = v.at(b.add(weights, b.mul(key, WORD(4))), 4 * KEYS * query)
            weight = v.all_lanes(v.load(at, FLOAT, 4))
            for number, column in enumerate(columns):
                index = (chain * count + query) * some + number
                now[index] = v.fma(weight, column, now[index])

    def step(index: ir.Value, *now: ir.Value) -> Sequence[ir.Value]:
        found = list(now)
        for chain in range(chains):
            add(b.add(b.mul(index, WORD(chains)), WORD(chain)), found, chain)
        return found

    def last(index: ir.Value, *now: ir.Value) -> Sequence[ir.Value]:
        found = list(now)
        add(b.sub(keys, WORD(1)), found, 0)
        return found

    start = []
    for query in range(count):
        factor = v.all_lanes(v.load(v.at(factors, 4 * query), FLOAT, 4))
        start += [b.fmul(v.load(place(query, number), v.floats, 4), factor) for number in range(some)]
    now: Any = [*start, *[v.constant(0.0)] * (len(start) * (chains - 1))]
    now = loop(b, b.udiv(keys, WORD(chains)), now, step)
    if chains == 2:
        now = loop(b, b.and_(keys, WORD(1)), now, last)
        now = [b.fadd(x, y) for x, y in zip(now[: len(start)], now[len(start) :], strict=True)]
    for index, value in enumerate(now):
        v.store(value, place(*divmod(index, some)))


def divided(shape: Shape, normal: bool) -> Callable[..., None]:
    """(sums, sum, to): a query's sums by its sum of powers (as they are, if not `normal`), in the columns' order."""

    def lay(v: Vectors, sums: ir.Value, total: ir.Value, to: ir.Value) -> None:
        heads = Heads(v, shape.format, shape.dim)
        vectors = [v.load(v.at(sums, 4 * v.lanes * number), v.floats, 4) for number in range(heads.count)]
        over = v.builder.fdiv(ir.Constant(FLOAT, 1.0), v.load(total, FLOAT, 4))
        for number, vector in enumerate(heads.sorted(vectors)):
            value = v.builder.fmul(vector, v.all_lanes(over)) if normal else vector
            v.store(value, v.at(to, 4 * v.lanes * number))

    return lay
