"""Rows in the formats that activations lie in, gone over by blocks of 32 columns: what loads, rounds and stores them.

In `q8_32` each block has a scale, and the sum of its 32 dequantised values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernelmux_numba.code import numbers
from kernelmux_numba.code.dots import HIGH, PAIRED
from kernelmux_numba.code.vectors import BYTE, FLOAT, SHORT, WORD, Vectors, function_of, given, loop, share
from kernelmux_numba.packing import BLOCK
from kernelmux_numba.target import Target

LARGEST = 127.0 * HIGH + 126.0
TINY = 2.0**-126
"""The smallest normal float32: what a scale is taken for where it is divided by, as core does."""

ANY = Target("", "", BLOCK, "pairs")
"""Of integers and float32 all targets are alike to LLVM."""


class Rows:
    """A tensor's elements in memory, by number: as float32, a vector from each on."""

    def __init__(self, format: str, planes: Sequence[ir.Value]) -> None:
        self.format, self.planes = format, planes

    def load(self, v: Vectors, index: ir.Value) -> ir.Value:
        b = v.builder
        if self.format != "q8_32":
            return numbers.load(v, self.format, self._at(v, index))
        integers = b.sext(v.load(b.add(self.planes[0], index), ir.VectorType(BYTE, v.lanes)), v.integers)
        scale = v.load(b.add(self.planes[1], _of_block(v, index)), FLOAT, 4)
        return b.fmul(b.sitofp(integers, v.floats), v.all_lanes(scale))

    def store(self, v: Vectors, index: ir.Value, values: ir.Value) -> None:
        """In `q8_32` a block, and its scale and sum."""
        b = v.builder
        if self.format != "q8_32":
            numbers.store(v, self.format, self._at(v, index), values)
            return
        qs, scales, sums = self.planes
        scale, sum_ = stored_in_eight_bits(v, values, b.add(qs, index))
        v.store(scale, b.add(scales, _of_block(v, index)))
        v.store(sum_, b.add(sums, _of_block(v, index)))

    def _at(self, v: Vectors, index: ir.Value) -> ir.Value:
        return v.builder.add(self.planes[0], v.builder.mul(index, WORD(numbers.ITEM_BYTES[self.format])))


def planes_of(format: str) -> int:
    """How many words a tensor takes."""
    return 3 if format == "q8_32" else 1


def _of_block(v: Vectors, index: ir.Value) -> ir.Value:
    """Bytes from the first scale to that of an element."""
    return v.builder.shl(v.builder.lshr(index, WORD(5)), WORD(2))


def magnitudes(v: Vectors, values: ir.Value) -> ir.Value:
    """As integers, which compare as they do, and of which NaN is the largest."""
    return v.builder.and_(v.builder.bitcast(values, v.integers), v.integer(0x7FFFFFFF))


def larger(b: ir.IRBuilder) -> Callable[[ir.Value, ir.Value], ir.Value]:
    """Of two vectors of integers, lane by lane."""
    return lambda a, c: b.select(b.icmp_signed(">", a, c), a, c)


def steps_of(v: Vectors, largest: ir.Value, most: float) -> tuple[ir.Value, ir.Value]:
    """The scale by which the largest magnitude (its bits, one lane) is `most`, and what values are multiplied by."""
    b = v.builder
    peak = b.bitcast(v.lane(largest), FLOAT)
    least = FLOAT(TINY * most)
    divided = b.select(b.fcmp_ordered("<", peak, least), least, peak)
    return b.fmul(peak, FLOAT(1 / most)), b.fdiv(FLOAT(most), divided)


def stored_in_eight_bits(v: Vectors, values: ir.Value, address: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Stores a block's integers; its scale, and the sum of what they stand for."""
    b = v.builder
    scale, inverse = steps_of(v, v.folded(magnitudes(v, values), larger(b)), 127.0)
    integers = b.fptosi(_rounded(v, b.fmul(values, v.all_lanes(inverse))), v.integers)
    v.store(b.trunc(integers, ir.VectorType(BYTE, v.lanes)), address)
    total = v.lane(v.folded(integers, b.add))
    return scale, b.fmul(b.sitofp(total, FLOAT), scale)


def over(
    builder: ir.IRBuilder, target: Target, first: ir.Value, count: ir.Value, body: Callable[[Vectors, ir.Value], None]
) -> None:
    """`body(vectors, index)` for so many elements: by blocks, then one by one."""
    b, wide, one = builder, Vectors(builder, target, BLOCK), Vectors(builder, target, 1)

    def laid(v: Vectors, index: ir.Value) -> Sequence[ir.Value]:
        body(v, index)
        return ()

    blocks = b.lshr(count, WORD(5))
    loop(b, blocks, [], lambda i: laid(wide, b.add(first, b.shl(i, WORD(5)))))
    after = b.add(first, b.shl(blocks, WORD(5)))
    loop(b, b.and_(count, WORD(BLOCK - 1)), [], lambda i: laid(one, b.add(after, i)))


def reduced(
    builder: ir.IRBuilder,
    target: Target,
    first: ir.Value,
    count: ir.Value,
    start: ir.Value,
    body: Callable[[Vectors, ir.Value, ir.Value], ir.Value],
    combine: Callable[[ir.Value, ir.Value], ir.Value],
) -> ir.Value:
    """What `body(vectors, index, so far)` makes of so many elements, each lane by itself, then all: one lane."""
    b, wide, one = builder, Vectors(builder, target, BLOCK), Vectors(builder, target, 1)
    blocks, rest = b.lshr(count, WORD(5)), b.and_(count, WORD(BLOCK - 1))
    (found,) = loop(b, blocks, [start], lambda i, now: [body(wide, b.add(first, b.shl(i, WORD(5))), now)])
    after = b.add(first, b.shl(blocks, WORD(5)))
    (total,) = loop(b, rest, [wide.folded(found, combine)], lambda i, now: [body(one, b.add(after, i), now)])
    return total


@intrinsic
def quantise(typing: Any, values: Any, qs: Any, scales: Any, sums: Any, block: Any) -> Any:
    """32 values, at a pointer, as that block of the planes at three others."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, given: Any) -> ir.Value:
        x, *planes = (builder.ptrtoint(pointer, WORD) for pointer in given[:4])
        v, index = Vectors(builder, ANY, BLOCK), builder.shl(given[4], WORD(5))
        Rows("q8_32", planes).store(v, index, Rows("f32", [x]).load(v, WORD(0)))
        return context.get_dummy_value()

    return types.void(values, qs, scales, sums, types.int64), emit


def sixteen_bits(target: Target) -> Callable[[int, int], None]:
    """Float32 as integers of 16 bits, as the target's products want them (`dots`).

    Words: the values, the integers (of two planes all of the first, then all of the second), a block's scale, its sum,
    the sums of its halves, how many blocks there are, and how many of them are a part.
    """
    store = _stored_as_two if target.dot == "fours" else _stored_for_pairs

    def lay(b: ir.IRBuilder, words: ir.Value, part: ir.Value) -> None:
        x, planes, scales, sums, halves, count, each = given(b, words, 7)
        v = Vectors(b, ANY, BLOCK)
        first, here = share(b, part, each, count)

        def block(number: ir.Value) -> Sequence[ir.Value]:
            index = b.add(first, number)
            element, place = b.shl(index, WORD(5)), b.shl(index, WORD(2))
            values = Rows("f32", [x]).load(v, element)
            scale, inverse = steps_of(v, v.folded(magnitudes(v, values), larger(b)), LARGEST)
            steps = _rounded(v, b.fmul(values, v.all_lanes(inverse)))
            integers = b.fptosi(steps, v.integers)
            store(v, steps, integers, planes, element, count)
            v.store(scale, b.add(scales, place))
            half = Vectors(b, ANY, BLOCK // 2)
            for number, lanes in enumerate((range(16), range(16, 32))):
                total = half.lane(half.folded(v.part(integers, lanes), b.add))
                v.store(b.fmul(b.sitofp(total, FLOAT), scale), v.at(b.add(halves, b.shl(place, WORD(1))), 4 * number))
            whole = v.lane(v.folded(integers, b.add))
            v.store(b.fmul(b.sitofp(whole, FLOAT), scale), b.add(sums, place))
            return ()

        loop(b, here, [], block)

    return function_of(lay)


def _stored_as_two(
    v: Vectors, steps: ir.Value, integers: ir.Value, planes: ir.Value, element: ir.Value, count: ir.Value
) -> None:
    """Each integer as 254 times one of eight bits, and another."""
    b, eight = v.builder, ir.VectorType(BYTE, v.lanes)
    highs = b.fptosi(_rounded(v, b.fmul(steps, v.constant(1 / HIGH))), v.integers)
    high, low = b.add(planes, element), b.add(b.add(planes, b.shl(count, WORD(5))), element)
    v.store(b.trunc(highs, eight), high)
    v.store(b.trunc(b.sub(integers, b.mul(highs, v.integer(HIGH))), eight), low)


def _stored_for_pairs(
    v: Vectors, steps: ir.Value, integers: ir.Value, planes: ir.Value, element: ir.Value, count: ir.Value
) -> None:
    order = [four + place for four in range(0, v.lanes, 4) for place in PAIRED]
    shorts = v.builder.trunc(v.part(integers, order), ir.VectorType(SHORT, v.lanes))
    v.store(shorts, v.builder.add(planes, v.builder.shl(element, WORD(1))))


def _rounded(v: Vectors, values: ir.Value) -> ir.Value:
    return v.call(f"llvm.rint.v{v.lanes}f32", v.floats, values)
