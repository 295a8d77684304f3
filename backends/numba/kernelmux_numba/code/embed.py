"""Rows of a table by id: of a table in GGUF's blocks these are taken apart 32 columns at a time.

The layouts are those of ggml-common.h in llama.cpp, as in core's graph/dequantize.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from llvmlite import ir

from kernelmux.graph.formats import lookup
from kernelmux_numba.code import numbers
from kernelmux_numba.code.convert import Rows, over, planes_of
from kernelmux_numba.code.vectors import BYTE, INTEGER, WORD, Vectors, function_of, given, loop, share
from kernelmux_numba.packing import BLOCK
from kernelmux_numba.target import Target


def embed(target: Target, table: str, output: str) -> Callable[[int, int], None]:
    """Words: ids, those of a part, columns, ids, bytes of the table's rows, the table, y's planes."""

    def lay(b: ir.IRBuilder, words: ir.Value, part: ir.Value) -> None:
        count, each, columns, ids, stride, rows, *planes = given(b, words, 6 + planes_of(output))
        first, mine = share(b, part, each, count)
        y = Rows(output, planes)

        def row(number: ir.Value) -> tuple[()]:
            place = b.add(first, number)
            wanted = b.sext(Vectors(b, target, 1).load(b.add(ids, b.shl(place, WORD(2))), INTEGER, 4), WORD)
            source, start = b.add(rows, b.mul(wanted, stride)), b.mul(place, columns)
            if table in numbers.ITEM_BYTES:
                x = Rows(table, [source])
                over(b, target, WORD(0), columns, lambda v, i: y.store(v, b.add(start, i), x.load(v, i)))
            else:
                _taken_apart(Vectors(b, target, BLOCK), table, source, columns, y, start)
            return ()

        loop(b, mine, [], row)

    return function_of(lay)


def _taken_apart(v: Vectors, table: str, source: ir.Value, columns: ir.Value, y: Rows, start: ir.Value) -> None:
    b, format = v.builder, lookup(table)

    def block(number: ir.Value) -> tuple[()]:
        here = b.add(source, b.mul(number, WORD(format.planes[0].items)))
        to = b.add(start, b.mul(number, WORD(format.block)))
        for run, values in enumerate(RUNS[table](_Block(v, here))):
            y.store(v, b.add(to, WORD(BLOCK * run)), values)
        return ()

    loop(b, b.udiv(columns, WORD(format.block)), [], block)


class _Block:
    """Fields of a block, by the bytes at which they start."""

    def __init__(self, v: Vectors, address: ir.Value) -> None:
        self.v, self.address = v, address

    def half(self, start: int) -> ir.Value:
        """A float16 number."""
        one = Vectors(self.v.builder, self.v.target, 1)
        return one.lane(numbers.load(one, "f16", one.at(self.address, start)))

    def byte(self, start: int) -> ir.Value:
        return self.v.load(self.v.at(self.address, start), BYTE)

    def bytes(self, start: int, count: int = BLOCK) -> ir.Value:
        return self.v.load(self.v.at(self.address, start), ir.VectorType(BYTE, count))

    def fields(self, start: int, shift: int, mask: int) -> ir.Value:
        """Of 32 bytes the bits of a mask, after a shift: integers."""
        b, packed = self.v.builder, self.bytes(start)
        moved = b.lshr(packed, ir.Constant(packed.type, [shift] * BLOCK)) if shift else packed
        return b.zext(b.and_(moved, ir.Constant(packed.type, [mask] * BLOCK)), self.v.integers)

    def nibbles(self, start: int) -> ir.Value:
        """Sixteen bytes: their lower halves, then their higher ones."""
        b, packed = self.v.builder, self.bytes(start, BLOCK // 2)
        low = b.and_(packed, ir.Constant(packed.type, [15] * (BLOCK // 2)))
        high = b.lshr(packed, ir.Constant(packed.type, [4] * (BLOCK // 2)))
        order = ir.Constant(self.v.integers, list(range(BLOCK)))
        return b.zext(b.shuffle_vector(low, high, order), self.v.integers)

    def fifth_bits(self, start: int) -> ir.Value:
        """32 bits, one a column, each worth 16."""
        v, b = self.v, self.v.builder
        every = v.all_lanes(v.load(v.at(self.address, start), INTEGER))
        ones = b.and_(b.lshr(every, ir.Constant(v.integers, list(range(BLOCK)))), v.integer(1))
        return b.shl(ones, v.integer(4))

    def six_bits(self, run: int) -> tuple[ir.Value, ir.Value]:
        """A run's scale and minimum, of six bits each: of the last four runs two of them lie with the first four's."""
        b = self.v.builder
        if run < 4:
            return tuple(b.and_(self.byte(start + run), BYTE(63)) for start in (4, 8))
        low, first, second = (self.byte(start + run) for start in (8, 0, 4))
        scale = b.or_(b.and_(low, BYTE(15)), b.shl(b.lshr(first, BYTE(6)), BYTE(4)))
        return scale, b.or_(b.lshr(low, BYTE(4)), b.shl(b.lshr(second, BYTE(6)), BYTE(4)))

    def scaled(self, integers: ir.Value, step: ir.Value, least: ir.Value | None = None, centre: int = 0) -> ir.Value:
        """(integer - centre) * step + least."""
        v, b = self.v, self.v.builder
        centred = b.sub(integers, v.integer(centre)) if centre else integers
        values = b.fmul(b.sitofp(centred, v.floats), step)
        return values if least is None else b.fadd(values, least)

    def everywhere(self, start: int) -> ir.Value:
        """A float16 number in every lane."""
        return self.v.all_lanes(self.half(start))


def _q4_0(block: _Block) -> Iterator[ir.Value]:
    yield block.scaled(block.nibbles(2), block.everywhere(0), centre=8)


def _q4_1(block: _Block) -> Iterator[ir.Value]:
    yield block.scaled(block.nibbles(4), block.everywhere(0), block.everywhere(2))


def _q5_0(block: _Block) -> Iterator[ir.Value]:
    integers = block.v.builder.or_(block.nibbles(6), block.fifth_bits(2))
    yield block.scaled(integers, block.everywhere(0), centre=16)


def _q5_1(block: _Block) -> Iterator[ir.Value]:
    integers = block.v.builder.or_(block.nibbles(8), block.fifth_bits(4))
    yield block.scaled(integers, block.everywhere(0), block.everywhere(2))


def _q8_0(block: _Block) -> Iterator[ir.Value]:
    yield block.scaled(block.v.builder.sext(block.bytes(2), block.v.integers), block.everywhere(0))


def _q4_k(block: _Block) -> Iterator[ir.Value]:
    for run in range(8):
        yield _of_six_bits(block, run, block.fields(16 + 32 * (run // 2), 4 * (run % 2), 15))


def _q5_k(block: _Block) -> Iterator[ir.Value]:
    b, v = block.v.builder, block.v
    for run in range(8):
        low = block.fields(48 + 32 * (run // 2), 4 * (run % 2), 15)
        fifth = b.shl(block.fields(16, run, 1), v.integer(4))
        yield _of_six_bits(block, run, b.or_(low, fifth))


def _of_six_bits(block: _Block, run: int, integers: ir.Value) -> ir.Value:
    b, v = block.v.builder, block.v
    scale, minimum = (b.uitofp(field, block.half(0).type) for field in block.six_bits(run))
    least = b.fsub(v.constant(-0.0), v.all_lanes(b.fmul(block.half(2), minimum)))
    return block.scaled(integers, v.all_lanes(b.fmul(block.half(0), scale)), least)


def _q6_k(block: _Block) -> Iterator[ir.Value]:
    b, v = block.v.builder, block.v
    for run in range(8):
        low = block.fields(64 * (run // 4) + 32 * (run % 2), 4 * (run // 2 % 2), 15)
        high = b.shl(block.fields(128 + 32 * (run // 4), 2 * (run % 4), 3), v.integer(4))
        steps = [b.sitofp(block.byte(192 + 2 * run + half), block.half(208).type) for half in range(2)]
        first, second = (v.all_lanes(b.fmul(block.half(208), step)) for step in steps)
        order = ir.Constant(v.integers, [lane if lane < 16 else BLOCK + lane for lane in range(BLOCK)])
        yield block.scaled(b.or_(low, high), b.shuffle_vector(first, second, order), centre=32)


RUNS: Mapping[str, Callable[[_Block], Iterator[ir.Value]]] = {
    **{"Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0},
    **{"Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k},
}
"""By type a block's values, 32 at a time."""
