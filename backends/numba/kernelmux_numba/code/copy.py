"""Rows of keys and values into the paged cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from kernelmux_numba.code import numbers
from kernelmux_numba.code.convert import Rows, larger, magnitudes, over, reduced, steps_of
from kernelmux_numba.code.vectors import BYTE, INTEGER, WORD, Vectors, function_of, given, loop, share
from kernelmux_numba.packing import BLOCK
from kernelmux_numba.target import Target

E4M3_MAX = 448.0


def cache_planes(format: str) -> int:
    """How many words a cache takes."""
    return 2 if format == "fp8_row" else 1


def copy(target: Target, format: str) -> Callable[[int, int], None]:
    """Words: rows, those of a part, heads, columns of a head, slots, k, v, and the planes of their caches."""

    def lay(b: ir.IRBuilder, words: ir.Value, part: ir.Value) -> None:
        count, each, heads, dim, slots, k, v, *planes = given(b, words, 7 + 2 * cache_planes(format))
        first, mine = share(b, part, each, count)
        sources = [(k, planes[: len(planes) // 2]), (v, planes[len(planes) // 2 :])]

        def row(number: ir.Value) -> tuple[()]:
            kept(b, target, format, slots, b.add(first, number), heads, dim, sources)
            return ()

        loop(b, mine, [], row)

    return function_of(lay)


def kept(
    b: ir.IRBuilder,
    target: Target,
    format: str,
    slots: ir.Value,
    row: ir.Value,
    heads: ir.Value,
    dim: ir.Value,
    sources: Sequence[tuple[ir.Value, Sequence[ir.Value]]],
) -> None:
    """A row of each source into its cache where the slot says; nowhere where that is -1."""
    slot = b.sext(Vectors(b, target, 1).load(b.add(slots, b.shl(row, WORD(2))), INTEGER, 4), WORD)
    with b.if_then(b.icmp_signed(">=", slot, WORD(0))):
        width = b.mul(heads, dim)
        for x, planes in sources:
            start = b.add(x, b.shl(b.mul(row, width), WORD(2)))
            if format == "fp8_row":
                _scaled(b, target, start, planes, b.mul(slot, heads), heads, dim)
            else:
                _plain(b, target, start, Rows(format, planes), b.mul(slot, width), width)


def _plain(b: ir.IRBuilder, target: Target, x: ir.Value, cache: Rows, place: ir.Value, count: ir.Value) -> None:
    source = Rows("f32", [x])
    over(b, target, WORD(0), count, lambda v, index: cache.store(v, b.add(place, index), source.load(v, index)))


def _scaled(
    b: ir.IRBuilder,
    target: Target,
    x: ir.Value,
    planes: Sequence[ir.Value],
    first: ir.Value,
    heads: ir.Value,
    dim: ir.Value,
) -> None:
    """Each head by a scale of its own, in e4m3."""
    source, (data, scales) = Rows("f32", [x]), planes
    wide, one = Vectors(b, target, BLOCK), Vectors(b, target, 1)

    def head(number: ir.Value) -> tuple[()]:
        start, place = b.mul(number, dim), b.add(first, number)

        def largest(v: Vectors, index: ir.Value, so_far: ir.Value) -> ir.Value:
            return larger(b)(magnitudes(v, source.load(v, index)), so_far)

        peak = reduced(b, target, start, dim, wide.integer(0), largest, larger(b))
        scale, inverse = steps_of(one, peak, E4M3_MAX)
        one.store(scale, b.add(scales, b.shl(place, WORD(2))))
        to = b.add(data, b.sub(b.mul(place, dim), start))

        def store(v: Vectors, index: ir.Value) -> None:
            steps = b.fmul(source.load(v, index), v.all_lanes(inverse))
            bits = numbers.rounded(v, steps, 4, 3, 0x7E, 0x7F)
            v.store(b.trunc(bits, ir.VectorType(BYTE, v.lanes)), b.add(to, index))

        over(b, target, start, dim, store)
        return ()

    loop(b, heads, [], head)
