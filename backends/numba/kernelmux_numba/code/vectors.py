"""Vectors of a target, in LLVM's instructions: what numba's Python has no words for.

Enters: a builder of instructions. Leaves: the instructions, laid by the functions here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernelmux_numba.code.memory import WORD, instructions
from kernelmux_numba.target import Target

BYTE, HALF, INTEGER, FLOAT = ir.IntType(8), ir.HalfType(), ir.IntType(32), ir.FloatType()
DOUBLE, SHORT = ir.DoubleType(), ir.IntType(16)

LINE = 64
"""Bytes of a cache line, or of half of one."""
NEAR = 3
"""To the first level of caches."""


class Vectors:
    """Lays instructions on vectors of as many lanes as a target's have, or of so many, which LLVM cuts to fit."""

    def __init__(self, builder: ir.IRBuilder, target: Target, lanes: int = 0) -> None:
        self.builder, self.target, self.lanes = builder, target, lanes or target.lanes
        self.floats = ir.VectorType(FLOAT, self.lanes)
        self.integers = ir.VectorType(INTEGER, self.lanes)
        self.bytes = ir.VectorType(BYTE, 4 * self.lanes)

    def at(self, address: ir.Value, offset: int = 0) -> ir.Value:
        """So many bytes beyond an address."""
        return self.builder.add(address, WORD(offset)) if offset else address

    def load(self, address: ir.Value, kind: ir.Type, align: int = 1) -> ir.Value:
        """What lies at an address, a word."""
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=align)

    def store(self, value: ir.Value, address: ir.Value) -> None:
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=1)

    def fetch(self, address: ir.Value, nbytes: int) -> None:
        """Has the processor bring cache lines nearer that are read soon; what lies beyond the memory is no fault."""
        for offset in range(0, nbytes, LINE):
            pointer = self.builder.inttoptr(self.at(address, offset), BYTE.as_pointer())
            self.call("llvm.prefetch.p0", ir.VoidType(), pointer, INTEGER(0), INTEGER(NEAR), INTEGER(1))

    def computed(self, vectors: Sequence[ir.Value]) -> Sequence[ir.Value]:
        """The same vectors, all in registers before any is used, and nothing that LLVM takes apart; on x86, that is."""
        if not self.target.x86:
            return vectors
        kinds, count = [vector.type for vector in vectors], len(vectors)
        register = "v" if self.lanes == 16 else "x"
        constraints = ",".join([f"={register}"] * count + [str(number) for number in range(count)])
        kind = ir.LiteralStructType(kinds) if count > 1 else kinds[0]
        found = self.builder.asm(ir.FunctionType(kind, kinds), "", constraints, vectors, side_effect=False)
        return [self.builder.extract_value(found, number) for number in range(count)] if count > 1 else [found]

    def halves(self, address: ir.Value) -> ir.Value:
        """Float16 of all lanes as float32."""
        return self.of_halves(self.load(address, ir.VectorType(SHORT, self.lanes)))

    def of_halves(self, bits: ir.Value) -> ir.Value:
        """Their sixteen bits as float32: by integers where LLVM would call a library that need not be there."""
        b = self.builder
        if self.target.float16:
            return b.fpext(b.bitcast(bits, ir.VectorType(HALF, self.lanes)), self.floats)
        bits = b.zext(bits, self.integers)
        sign = b.shl(b.and_(bits, self.integer(0x8000)), self.integer(16))
        rest = b.shl(b.and_(bits, self.integer(0x7FFF)), self.integer(13))
        # The exponent's offset by a product, which makes normal numbers of the others too.
        finite = b.bitcast(b.fmul(b.bitcast(rest, self.floats), self.constant(2.0**112)), self.integers)
        endless = b.icmp_unsigned(">=", rest, self.integer(0x7C00 << 13))
        whole = b.select(endless, b.or_(rest, self.integer(0x7F800000)), finite)
        return b.bitcast(b.or_(whole, sign), self.floats)

    def all_lanes(self, value: ir.Value) -> ir.Value:
        """One number, or truth, in every lane."""
        kind = ir.VectorType(value.type, self.lanes)
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, INTEGER(0))
        return self.builder.shuffle_vector(
            first, ir.Constant(kind, ir.Undefined), ir.Constant(self.integers, [0] * self.lanes)
        )

    def constant(self, value: float) -> ir.Value:
        return ir.Constant(self.floats, [value] * self.lanes)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a b + c, of float32 or float64, rounded once where the processor can."""
        return self.call(f"llvm.fmuladd.v{self.lanes}f{64 if a.type.element == DOUBLE else 32}", a.type, a, b, c)

    def polynomial(self, x: ir.Value, coefficients: Sequence[float]) -> ir.Value:
        """By Horner's rule, the highest power's coefficient first."""
        total = self.constant(coefficients[0])
        for coefficient in coefficients[1:]:
            total = self.fma(total, x, self.constant(coefficient))
        return total

    def integer(self, value: int) -> ir.Value:
        """One number of 32 bits in every lane."""
        return ir.Constant(self.integers, [value] * self.lanes)

    def lane(self, vector: ir.Value, number: int = 0) -> ir.Value:
        return self.builder.extract_element(vector, INTEGER(number))

    def part(self, vector: ir.Value, lanes: Sequence[int]) -> ir.Value:
        """A vector of some lanes of another."""
        picked = ir.Constant(ir.VectorType(INTEGER, len(lanes)), list(lanes))
        return self.builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), picked)

    def folded(self, vector: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
        """All lanes combined, halves with halves: a vector of one lane."""
        count = self.lanes
        while count > 1:
            count //= 2
            vector = combine(self.part(vector, range(count)), self.part(vector, range(count, 2 * count)))
        return vector

    def call(self, name: str, result: ir.Type, *operands: ir.Value) -> ir.Value:
        """One of LLVM's own functions."""
        kind = ir.FunctionType(result, [operand.type for operand in operands])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), operands)

    def fields(self, packed: ir.Value, shift: int, mask: int, width: int) -> ir.Value:
        """The bits of `mask` of each `width` bits, after a shift to the right, or to the left where it is negative."""
        # By bytes too: processors shift no narrower ones than 16 bits.
        count, kind = 2 * self.lanes, ir.VectorType(SHORT, 2 * self.lanes)
        by = ir.Constant(kind, [abs(shift)] * count)
        held = self.builder.bitcast(packed, kind)
        moved = self.builder.lshr(held, by) if shift > 0 else self.builder.shl(held, by) if shift else held
        kept = ir.Constant(kind, [mask * (0x101 if width == 8 else 1)] * count)
        return self.builder.bitcast(self.builder.and_(moved, kept), self.integers)


def laid(target: Target, lay: Callable[..., None]) -> Any:
    """Instructions as a function of words for numba's Python: `lay(vectors, *words)` lays them where it is called."""
    count = len(signature(lay).parameters) - 1
    return instructions(lambda builder, *words: lay(Vectors(builder, target), *words), count)


def unary(lay: Callable[[ir.IRBuilder, ir.Value], ir.Value]) -> Any:
    """Instructions as a function of a float32 that gives another."""

    @intrinsic
    def found(typing: Any, value: Any) -> Any:
        def emit(context: Any, builder: ir.IRBuilder, signature: Any, given: Any) -> ir.Value:
            return lay(builder, given[0])

        return types.float32(types.float32), emit

    return found


def stack(count: int) -> Any:
    """What gives the address of so many bytes that are a call's own, at a cache line's start."""

    def lay(builder: ir.IRBuilder) -> ir.Value:
        # Not numba's own `alloca_once`, which fills it with zeros.
        with builder.goto_entry_block():
            memory = builder.alloca(ir.ArrayType(BYTE, count))
        memory.align = 64
        return builder.ptrtoint(memory, WORD)

    return instructions(lay, 0, types.int64)


def loop(builder: ir.IRBuilder, count: ir.Value, carried: Sequence[ir.Value], body: Any) -> Sequence[ir.Value]:
    """`body(index, *carried)` so many times, each with what the last one gave; what the last one gave."""
    before = builder.block
    head, inside, after = (builder.append_basic_block(name) for name in ("loop", "body", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(WORD)
    values = [builder.phi(value.type) for value in carried]
    index.add_incoming(WORD(0), before)
    for phi, value in zip(values, carried, strict=True):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", index, count), inside, after)
    builder.position_at_end(inside)
    following = body(index, *values)
    index.add_incoming(builder.add(index, WORD(1)), builder.block)
    for phi, value in zip(values, following, strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return values


def function_of(lay: Callable[[ir.IRBuilder, ir.Value, ir.Value], None]) -> Callable[[int, int], None]:
    """The function of words and part that consists of the instructions which `lay` lays."""

    whole = instructions(lay, 2)

    def run(words: int, part: int) -> None:
        whole(words, part)

    return run


def given(builder: ir.IRBuilder, words: ir.Value, count: int) -> list[ir.Value]:
    """The first so many words."""
    at = builder.inttoptr(words, WORD.as_pointer())
    return [builder.load(builder.gep(at, [WORD(index)]), align=8) for index in range(count)]


def share(builder: ir.IRBuilder, part: ir.Value, each: ir.Value, count: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The first of a part's things, `each` of `count`, and how many it has."""
    first = builder.mul(part, each)
    left = builder.sub(count, first)
    return first, builder.select(builder.icmp_signed("<", each, left), each, left)
