"""Dot products of a block's integers: by fours of eight bits where the processor multiplies these, else by pairs of 16.

An activation has 16 bits (`convert.sixteen_bits`): as two integers of eight in two planes, 254 times the first and the
second, or as one in a plane of its own. There are as many instructions either way, but one integer needs no sum of two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import ClassVar

from llvmlite import ir

from kernelmux_numba.code.vectors import SHORT, Vectors
from kernelmux_numba.packing import BLOCK, Packing
from kernelmux_numba.target import Target

HIGH = 254
"""What the first of two integers counts: the second is then from -127 to 127, as products of bytes want it."""
PAIRED = (0, 2, 1, 3)
"""The order of each four activations where pairs are multiplied: weights of a byte each are taken apart in it."""


class Dots(ABC):
    """How a block of a panel is multiplied, a vector of its integers by as many activations at a time."""

    planes: ClassVar[int]
    """Of activations."""
    vectors: ClassVar[int]
    """Of a block's integers."""

    def __init__(self, packing: Packing) -> None:
        self.packing = packing

    @property
    def block_bytes(self) -> int:
        """Of a block of activations in a plane."""
        return 4 * self.vectors

    @abstractmethod
    def unpacked(self, v: Vectors, start: ir.Value) -> Callable[[int], ir.Value]:
        """A block's vectors of integers by number, taken apart where they are asked for."""

    @abstractmethod
    def added(
        self, v: Vectors, sums: Sequence[ir.Value], weights: ir.Value, x: Sequence[ir.Value]
    ) -> Sequence[ir.Value]:
        """Sums of each plane, with a vector's products by 32 bits of each plane's activations, in every lane."""

    @abstractmethod
    def total(self, v: Vectors, sums: Sequence[ir.Value]) -> ir.Value:
        """What the sums of all planes make."""

    @abstractmethod
    def keep_order(self, v: Vectors, sums: Sequence[Sums]) -> None:
        """Keeps LLVM from multiplying row by row, for which it spills a block's integers where registers are few."""


class Fours(Dots):
    """Bytes by vpdpbusd (AVX-512 VNNI, AVX-VNNI): weights without a sign by activations that have one."""

    planes, vectors = 2, BLOCK // 4

    def unpacked(self, v: Vectors, start: ir.Value) -> Callable[[int], ir.Value]:
        held, bits = _held(v, start), self.packing.bits

        def vector(number: int) -> ir.Value:
            return held(number) if bits == 8 else _joined(v, held, bits, number)

        return vector

    def added(
        self, v: Vectors, sums: Sequence[ir.Value], weights: ir.Value, x: Sequence[ir.Value]
    ) -> Sequence[ir.Value]:
        name = f"llvm.x86.avx512.vpdpbusd.{32 * v.lanes}"
        return [v.call(name, v.integers, so_far, weights, each) for so_far, each in zip(sums, x, strict=True)]

    def total(self, v: Vectors, sums: Sequence[ir.Value]) -> ir.Value:
        return v.builder.add(v.builder.mul(sums[0], v.integer(HIGH)), sums[1])

    def keep_order(self, v: Vectors, sums: Sequence[Sums]) -> None:
        pass  # What is loaded is an operand of the product itself: LLVM has nothing to put off.


class Pairs(Dots):
    """Sixteen bits by vpmaddwd, or what other processors have for it."""

    planes, vectors = 1, BLOCK // 2

    def unpacked(self, v: Vectors, start: ir.Value) -> Callable[[int], ir.Value]:
        """Vector 2 t has inputs 4 t and 4 t + 2, which are low bytes of 16 bits, vector 2 t + 1 the two high ones."""
        held, bits, b = _held(v, start), self.packing.bits, v.builder
        shorts = ir.VectorType(SHORT, 2 * v.lanes)
        eight = ir.Constant(shorts, [8] * (2 * v.lanes))

        @cache
        def joined(number: int) -> ir.Value:
            # Once for both of its halves, of which LLVM would join each by itself.
            return v.computed([_joined(v, held, bits, number)])[0]

        def vector(number: int) -> ir.Value:
            if bits == 4:
                return v.fields(held(number // 4), 4 * (number // 2 % 2) + 8 * (number % 2), 15, 16)
            if bits < 8:
                return v.fields(joined(number // 2), 8 * (number % 2), 255, 16)
            both = b.bitcast(held(number // 2), shorts)
            return b.bitcast(b.ashr(both if number % 2 else b.shl(both, eight), eight), v.integers)

        return vector

    def added(
        self, v: Vectors, sums: Sequence[ir.Value], weights: ir.Value, x: Sequence[ir.Value]
    ) -> Sequence[ir.Value]:
        return [v.builder.add(sums[0], _products_in_pairs(v, weights, x[0]))]

    def total(self, v: Vectors, sums: Sequence[ir.Value]) -> ir.Value:
        return sums[0]

    def keep_order(self, v: Vectors, sums: Sequence[Sums]) -> None:
        found = v.computed([each.planes[0] for each in sums])
        for each, plane in zip(sums, found, strict=True):
            each.planes = [plane]


def dots_of(target: Target, packing: Packing) -> Dots:
    """How a processor multiplies integers packed so."""
    return Fours(packing) if target.dot == "fours" else Pairs(packing)


class Sums:
    """The sums of some products, of each plane of activations."""

    def __init__(self, v: Vectors, dots: Dots) -> None:
        self._v, self._dots = v, dots
        self.planes: Sequence[ir.Value] = [v.integer(0)] * dots.planes

    def add(self, weights: ir.Value, activations: Sequence[ir.Value]) -> None:
        """Adds the products of a vector of integers and 32 bits of each plane, in every lane."""
        self.planes = self._dots.added(self._v, self.planes, weights, activations)

    def total(self) -> ir.Value:
        """The sums of all lanes."""
        return self._dots.total(self._v, self.planes)


def _held(v: Vectors, start: ir.Value) -> Callable[[int], ir.Value]:
    return lambda number: v.load(v.at(start, 4 * v.lanes * number), v.integers)


def _joined(v: Vectors, held: Callable[[int], ir.Value], bits: int, number: int) -> ir.Value:
    """Vector `number` of integers of four, five or six bits, a byte each."""
    low = v.fields(held(number // 2), 4 * (number % 2), 15, 8)
    if bits == 4:
        return low
    if bits == 5:
        return v.builder.or_(low, v.fields(held(4), number - 4, 16, 8))
    return v.builder.or_(low, v.fields(held(4 + number // 4), 2 * (number % 4) - 4, 48, 8))


def _products_in_pairs(v: Vectors, a: ir.Value, c: ir.Value) -> ir.Value:
    """Sums of the products of a lane's two signed integers of 16 bits."""
    b, shorts = v.builder, ir.VectorType(SHORT, 2 * v.lanes)
    a, c = b.bitcast(a, shorts), b.bitcast(c, shorts)
    names = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}
    if v.target.x86:
        return v.call(names[v.lanes], v.integers, a, c)
    parts = []
    for half in range(2):
        picked = ir.Constant(v.integers, [2 * lane + half for lane in range(v.lanes)])
        undefined = ir.Constant(shorts, ir.Undefined)
        wide = [b.sext(b.shuffle_vector(each, undefined, picked), v.integers) for each in (a, c)]
        parts.append(b.mul(*wide))
    return b.add(*parts)
