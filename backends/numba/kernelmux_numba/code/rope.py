"""Heads turned by position; and, where copy follows, keys and values into the cache without going through memory."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from kernelmux_numba.code.convert import Rows, over
from kernelmux_numba.code.copy import cache_planes, kept
from kernelmux_numba.code.numbers import doubles, turns
from kernelmux_numba.code.vectors import DOUBLE, FLOAT, INTEGER, WORD, Vectors, function_of, given, loop, share
from kernelmux_numba.target import Target

PAIRS = 8
"""How many are turned at once."""
TURNED = 13
"""Words of a rope, before its frequencies."""


class _Rope:
    """The turns of a row: words are rows, those of a part, query heads, key heads, columns of a head and how many of
    them turn, the magnitude, positions, q, k, where they go when turned, where the frequencies lie in the words."""

    def __init__(self, b: ir.IRBuilder, target: Target, pairing: str, words: ir.Value) -> None:
        self.b, self.target, self.pairing = b, target, pairing
        self.rows, self.each, q_heads, k_heads, self.dim, self.dims, magnitude, *rest = given(b, words, TURNED)
        self.positions, q, k, q_to, k_to, where = rest
        self.magnitude = b.fptrunc(b.bitcast(magnitude, DOUBLE), FLOAT)
        self.frequencies = b.add(words, b.shl(where, WORD(3)))
        self.turned = ((q_heads, q, q_to), (k_heads, k, k_to))

    def row(self, row: ir.Value) -> None:
        b = self.b
        one, some = Vectors(b, self.target, 1), Vectors(b, self.target, PAIRS)
        place = one.load(b.add(self.positions, b.shl(row, WORD(2))), INTEGER, 4)
        position = b.sitofp(place, DOUBLE)
        pairs = b.lshr(self.dims, WORD(1))
        whole = b.and_(pairs, WORD(-PAIRS))
        loop(b, b.udiv(pairs, WORD(PAIRS)), [], lambda i: self._pairs(some, row, position, b.mul(i, WORD(PAIRS))))
        loop(b, b.sub(pairs, whole), [], lambda i: self._pairs(one, row, position, b.add(whole, i)))
        with b.if_then(b.icmp_signed("<", self.dims, self.dim)):
            for heads, x, y in self.turned:
                loop(b, heads, [], lambda head, x=x, y=y, heads=heads: self._passed(row, head, heads, x, y))

    def _pairs(self, v: Vectors, row: ir.Value, position: ir.Value, pair: ir.Value) -> tuple[()]:
        """Some pairs of all heads."""
        b = self.b
        frequencies = v.load(b.add(self.frequencies, b.shl(pair, WORD(3))), doubles(v))
        cosine, sine = turns(v, b.fmul(frequencies, v.all_lanes(position)))
        cosine, sine = (b.fmul(part, v.all_lanes(self.magnitude)) for part in (cosine, sine))

        def turn(start: ir.Value, x: ir.Value, y: ir.Value) -> tuple[()]:
            left, right = self._load(v, x, start, pair)
            minus = b.fsub(v.constant(-0.0), sine)
            self._store(
                v,
                y,
                start,
                pair,
                v.fma(left, cosine, b.fmul(right, minus)),
                v.fma(left, sine, b.fmul(right, cosine)),
            )
            return ()

        for heads, x, y in self.turned:
            first = b.mul(row, heads)
            loop(b, heads, [], lambda head, x=x, y=y, first=first: turn(b.mul(b.add(first, head), self.dim), x, y))
        return ()

    def _load(self, v: Vectors, x: ir.Value, start: ir.Value, pair: ir.Value) -> list[ir.Value]:
        b = self.b
        if self.pairing == "halves":
            return [v.load(self._at(x, start, place), v.floats) for place in self._halves(pair)]
        both = v.load(self._at(x, start, b.shl(pair, WORD(1))), ir.VectorType(FLOAT, 2 * v.lanes))
        return [v.part(both, range(side, 2 * v.lanes, 2)) for side in (0, 1)]

    def _store(self, v: Vectors, y: ir.Value, start: ir.Value, pair: ir.Value, left: ir.Value, right: ir.Value) -> None:
        b = self.b
        if self.pairing == "halves":
            for place, part in zip(self._halves(pair), (left, right), strict=True):
                v.store(part, self._at(y, start, place))
            return
        order = [lane + side * v.lanes for lane in range(v.lanes) for side in (0, 1)]
        both = b.shuffle_vector(left, right, ir.Constant(ir.VectorType(INTEGER, 2 * v.lanes), order))
        v.store(both, self._at(y, start, b.shl(pair, WORD(1))))

    def _halves(self, pair: ir.Value) -> tuple[ir.Value, ir.Value]:
        return pair, self.b.add(pair, self.b.lshr(self.dims, WORD(1)))

    def _at(self, x: ir.Value, start: ir.Value, column: ir.Value) -> ir.Value:
        return self.b.add(x, self.b.shl(self.b.add(start, column), WORD(2)))

    def _passed(self, row: ir.Value, head: ir.Value, heads: ir.Value, x: ir.Value, y: ir.Value) -> tuple[()]:
        """What of a head does not turn."""
        b, source, to = self.b, Rows("f32", [x]), Rows("f32", [y])
        first = b.add(b.mul(b.add(b.mul(row, heads), head), self.dim), self.dims)
        count = b.sub(self.dim, self.dims)
        over(b, self.target, first, count, lambda v, index: to.store(v, index, source.load(v, index)))
        return ()


def rope(target: Target, pairing: str) -> Callable[[int, int], None]:
    """Queries and keys, turned."""

    def lay(b: ir.IRBuilder, words: ir.Value, part: ir.Value) -> None:
        turned = _Rope(b, target, pairing, words)
        first, mine = share(b, part, turned.each, turned.rows)

        def row(number: ir.Value) -> tuple[()]:
            turned.row(b.add(first, number))
            return ()

        loop(b, mine, [], row)

    return function_of(lay)


def rope_copy(target: Target, pairing: str, format: str) -> Callable[[int, int], None]:
    """Queries turned; keys too, from where they are turned to into their cache, and values into theirs.

    After a rope's words: slots, values, and the planes of the caches.
    """

    def lay(b: ir.IRBuilder, words: ir.Value, part: ir.Value) -> None:
        turned = _Rope(b, target, pairing, words)
        slots, values, *planes = given(b, words, TURNED + 2 + 2 * cache_planes(format))[TURNED:]
        first, mine = share(b, part, turned.each, turned.rows)
        (_, (heads, _, keys)), half = turned.turned, len(planes) // 2
        sources = [(keys, planes[:half]), (values, planes[half:])]

        def row(number: ir.Value) -> tuple[()]:
            place = b.add(first, number)
            turned.row(place)
            kept(b, target, format, slots, place, heads, turned.dim, sources)
            return ()

        loop(b, mine, [], row)

    return function_of(lay)
