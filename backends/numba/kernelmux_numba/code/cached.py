"""A head's numbers of one position, as a cache stores them, in vectors of float32.

They come in one of two orders: as they are stored, or in the one that is least work. That differs for bfloat16, two of
which are 32 bits: of twice as many numbers as a vector has lanes the even ones come first, then the odd ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from llvmlite import ir

from kernelmux_numba.code.numbers import ITEM_BYTES
from kernelmux_numba.code.vectors import BYTE, FLOAT, INTEGER, SHORT, Vectors

BIT = ir.IntType(1)
BYTES = {**ITEM_BYTES, "fp8_row": 1}


class Heads:
    """Reads heads of so many columns in a format; a last vector that is not full has zeros."""

    def __init__(self, v: Vectors, format: str, columns: int) -> None:
        self.v, self.format, self.columns = v, format, columns
        self.count = -(-columns // v.lanes)
        self._paired = columns // (2 * v.lanes) if format == "bf16" else 0

    def stored(self, address: ir.Value, number: int) -> ir.Value:
        """The vector of that number, in the order of the columns."""
        v, b = self.v, self.v.builder
        at = v.at(address, number * v.lanes * BYTES[self.format])
        if self.format == "f32":
            return self.held(at, FLOAT, number)
        if self.format == "f16":
            return v.of_halves(self.held(at, SHORT, number))
        if self.format == "bf16":
            wide = b.zext(self.held(at, SHORT, number), v.integers)
            return b.bitcast(b.shl(wide, v.integer(16)), v.floats)
        return self._e4m3(b.zext(self.held(at, BYTE, number), v.integers))

    def easiest(self, address: ir.Value, first: int, count: int) -> Sequence[ir.Value]:
        """Some vectors of the order that is least work; an even number of them, from an even one on."""
        found: list[ir.Value] = []
        for number in range(first, min(first + count, self.count)):
            if number // 2 >= self._paired:
                found.append(self.stored(address, number))
            elif number % 2 == 0:
                found += self._pair(address, number)
        return found

    def sorted(self, vectors: Sequence[ir.Value]) -> Sequence[ir.Value]:
        """All vectors of the easiest order in that of the columns."""
        lanes = self.v.lanes
        woven = [lane // 2 + lanes * (lane % 2) for lane in range(2 * lanes)]
        return self._changed(vectors, woven[:lanes], woven[lanes:])

    def eased(self, vectors: Sequence[ir.Value]) -> Sequence[ir.Value]:
        """All vectors of the columns' order in the easiest."""
        lanes = self.v.lanes
        return self._changed(vectors, range(0, 2 * lanes, 2), range(1, 2 * lanes, 2))

    def held(self, at: ir.Value, element: ir.Type, number: int) -> ir.Value:
        """A vector's elements as they lie in memory; none beyond the columns is read."""
        v = self.v
        kind = ir.VectorType(element, v.lanes)
        if (number + 1) * v.lanes <= self.columns:
            return v.load(at, kind)
        from_, zeros = v.builder.inttoptr(at, kind.as_pointer()), ir.Constant(kind, [0] * v.lanes)
        name = f"llvm.masked.load.v{v.lanes}{element.intrinsic_name}.p0"
        return v.call(name, kind, from_, INTEGER(1), self.kept(number), zeros)

    def kept(self, number: int) -> ir.Constant:
        """Which lanes of a vector are columns."""
        lanes = self.v.lanes
        inside = [number * lanes + lane < self.columns for lane in range(lanes)]
        return ir.Constant(ir.VectorType(BIT, lanes), inside)

    def _changed(self, vectors: Sequence[ir.Value], first: Sequence[int], second: Sequence[int]) -> Sequence[ir.Value]:
        found = list(vectors)
        for pair in range(self._paired):
            x, y = found[2 * pair : 2 * pair + 2]
            found[2 * pair : 2 * pair + 2] = [picked(self.v, x, y, first), picked(self.v, x, y, second)]
        return found

    def _pair(self, address: ir.Value, number: int) -> Sequence[ir.Value]:
        v, b = self.v, self.v.builder
        both = v.load(v.at(address, 2 * number * v.lanes), v.integers)
        even, odd = b.shl(both, v.integer(16)), b.and_(both, v.integer(0xFFFF0000))
        return [b.bitcast(even, v.floats), b.bitcast(odd, v.floats)]

    def _e4m3(self, bits: ir.Value) -> ir.Value:
        """Sign, four bits of exponent with a bias of 7, three of mantissa; all ones are NaN."""
        v, b = self.v, self.v.builder
        size = b.and_(bits, v.integer(0x7F))
        normal = b.bitcast(b.add(b.shl(size, v.integer(20)), v.integer((127 - 7) << 23)), v.floats)
        subnormal = b.fmul(b.sitofp(size, v.floats), v.constant(2.0**-9))
        value = b.select(b.icmp_signed("<", size, v.integer(8)), subnormal, normal)
        value = b.select(b.icmp_signed("==", size, v.integer(0x7F)), v.constant(math.nan), value)
        sign = b.shl(b.and_(bits, v.integer(0x80)), v.integer(24))
        return b.bitcast(b.or_(b.bitcast(value, v.integers), sign), v.floats)


def picked(v: Vectors, x: ir.Value, y: ir.Value, lanes: Sequence[int]) -> ir.Value:
    """A vector of lanes of two, those of the second numbered after those of the first."""
    return v.builder.shuffle_vector(x, y, ir.Constant(v.integers, list(lanes)))


def turned(v: Vectors, rows: Sequence[ir.Value]) -> Sequence[ir.Value]:
    """As many vectors as they have lanes, transposed: lane i of vector j becomes lane j of vector i."""
    found, lanes, step = list(rows), v.lanes, 1
    while step < lanes:
        for number in range(lanes):
            if number & step == 0:
                x, y = found[number], found[number + step]
                low = [lane if lane & step == 0 else lanes + lane - step for lane in range(lanes)]
                high = [lane + step if lane & step == 0 else lanes + lane for lane in range(lanes)]
                found[number], found[number + step] = picked(v, x, y, low), picked(v, x, y, high)
        step *= 2
    return found


class Sums:
    """The sums of the lanes of as many vectors as they have lanes, one a lane of a vector.

    Two vectors that each hold the parts of some sums make one that holds those of twice as many, half as many of each.
    """

    def __init__(self, v: Vectors) -> None:
        self.v = v
        self._waiting: list[tuple[int, ir.Value]] = []

    @staticmethod
    def order(lanes: int) -> Sequence[int]:
        """Which vector must be added as which: lane i of the result is the sum of the `order.index(i)`-th."""
        return _order(lanes)

    def add(self, vector: ir.Value) -> None:
        width = self.v.lanes
        while self._waiting and self._waiting[-1][0] == width:
            _, before = self._waiting.pop()
            low, high = halves_of(self.v.lanes, width)
            vector = self.v.builder.fadd(picked(self.v, before, vector, low), picked(self.v, before, vector, high))
            width //= 2
        self._waiting.append((width, vector))

    def total(self) -> ir.Value:
        ((_, vector),) = self._waiting
        return vector


def halves_of(lanes: int, width: int) -> tuple[Sequence[int], Sequence[int]]:
    """The lanes of two vectors that hold the first and the second half of the parts, so many neighbours, of each sum.

    As the processor's shuffles have them: whole quarters of 128 bits, or the same lanes of every quarter.
    """
    half = width // 2
    if width > 4:
        starts = range(0, 2 * lanes, width)
        low = [start + lane for start in starts for lane in range(half)]
        return low, [lane + half for lane in low]
    low = []
    for quarter in range(0, lanes, 4):
        for vector in (0, lanes):
            low += [vector + quarter + start + lane for start in range(0, 4, width) for lane in range(half)]
    return low, [lane + half for lane in low]


def _order(lanes: int) -> Sequence[int]:
    """By doing it with the vectors' numbers in place of their lanes."""
    level, width = [[number] * lanes for number in range(lanes)], lanes
    while width > 1:
        low, _ = halves_of(lanes, width)
        pairs = [[*level[i], *level[i + 1]] for i in range(0, len(level), 2)]
        level, width = [[pair[lane] for lane in low] for pair in pairs], width // 2
    return level[0]
