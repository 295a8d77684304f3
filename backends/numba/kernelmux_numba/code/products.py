"""Products of activations in two integers with panels of quantised weights, and of float32 with panels of dense ones.

Each lane of a vector sums an output of its own, so that nothing is added across lanes. Some rows are multiplied at
once, so that a panel's integers are unpacked once for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from kernelmux_numba.code.convert import HIGH
from kernelmux_numba.code.memory import word
from kernelmux_numba.code.numbers import load
from kernelmux_numba.code.vectors import BYTE, FLOAT, INTEGER, WORD, Products, Vectors, laid, loop
from kernelmux_numba.packing import BLOCK, SUPERBLOCK, Packing
from kernelmux_numba.target import Target

# The words that a product is given.
PANELS, PANEL_BYTES, INPUTS, OUTPUTS, ROWS, X, SCALES, SUMS, Y, Y_STRIDE, ADDED, ADDED_STRIDE, BIAS, AT_ONCE = range(14)
"""The panels; bytes of one; inputs (a quantised weight's in blocks); outputs; rows; the activations and, of quantised
ones, their scales and the sums of their groups; results, and bytes from one row to the next; what is added to them,
likewise, or 0; a bias or 0; panels of a part."""

Fields = tuple[Sequence[ir.Value], Sequence[ir.Value]]
"""Scales and minima of a block, of each group a vector."""
AT_MOST = {16: (8, 4, 2), 8: (4, 3, 2), 4: (4, 3, 2)}
"""By lanes: the rows of tiles, beside those of one row. A row's sums and totals are to stay in registers."""


def quantised(target: Target, packing: Packing) -> Callable[[int, int], None]:
    """Products with weights packed so, of activations that are two integers each (`convert.sixteen_bits`)."""
    return _by_tiles(target, lambda rows: _Quantised(target, rows, packing))


def dense(target: Target, format: str) -> Callable[[int, int], None]:
    """Products with weights in panels of plain numbers."""
    return _by_tiles(target, lambda rows: _Dense(target, rows, format))


def one_row(target: Target, packing: Packing) -> Any:
    """One row by one panel of weights packed so: a function of a product's words, the panel and the row."""
    return _Quantised(target, 1, packing).laid()


def _by_tiles(target: Target, tile_of: Callable[[int], _Tile]) -> Callable[[int, int], None]:
    """A part's panels, each by all rows: as many at once as there is a tile for, then fewer."""
    lanes, (many, some, two) = target.lanes, AT_MOST[target.lanes]
    by_many, by_some, by_two, by_one = (tile_of(rows).laid() for rows in (many, some, two, 1))

    def product(words: int, part: int) -> None:
        first = part * word(words, AT_ONCE)
        last = min(first + word(words, AT_ONCE), (word(words, OUTPUTS) + lanes - 1) // lanes)
        rows = word(words, ROWS)
        for panel in range(first, last):
            row = 0
            while rows - row >= many:
                by_many(words, panel, row)
                row += many
            while rows - row >= some:
                by_some(words, panel, row)
                row += some
            if rows - row >= two:
                by_two(words, panel, row)
                row += two
            if row < rows:
                by_one(words, panel, row)

    return product


class _Tile(ABC):
    """Some rows by one panel."""

    def __init__(self, target: Target, rows: int) -> None:
        self.target, self.rows = target, rows

    def laid(self) -> Any:
        """The tile as a function of the words, the panel and the first row."""
        return laid(self.target, self._lay)

    @abstractmethod
    def totals(self, v: Vectors, words: Any, panel: ir.Value, row: ir.Value) -> Sequence[ir.Value]:
        """A vector of sums for each row."""

    def _lay(self, v: Vectors, words: ir.Value, panel: ir.Value, row: ir.Value) -> None:
        b, lanes = v.builder, self.target.lanes
        given = [v.load(v.at(words, 8 * index), WORD, 8) for index in range(AT_ONCE)]
        totals = self.totals(v, given, panel, row)
        column = b.mul(panel, WORD(lanes))
        whole = b.icmp_signed("<=", b.add(column, WORD(lanes)), given[OUTPUTS])
        kept = self._kept(v, b.sub(given[OUTPUTS], column))
        bias = self._optional(v, given, BIAS, b.mul(column, WORD(4)), kept)
        for number, total in enumerate(totals):
            at = b.add(row, WORD(number))
            place = b.add(b.mul(at, given[ADDED_STRIDE]), b.mul(column, WORD(4)))
            sums = b.fadd(b.fadd(total, bias), self._optional(v, given, ADDED, place, kept))
            y = b.add(given[Y], b.add(b.mul(at, given[Y_STRIDE]), b.mul(column, WORD(4))))
            with b.if_else(whole) as (all_of_it, part_of_it):
                with all_of_it:
                    v.store(sums, y)
                with part_of_it:
                    into = b.inttoptr(y, v.floats.as_pointer())
                    v.call(f"llvm.masked.store.v{lanes}f32.p0", ir.VoidType(), sums, into, INTEGER(1), kept)

    def _kept(self, v: Vectors, count: ir.Value) -> ir.Value:
        """Which lanes come before so many."""
        wide = ir.VectorType(WORD, v.lanes)
        numbers = ir.Constant(wide, list(range(v.lanes)))
        return v.builder.icmp_signed("<", numbers, v.all_lanes(count))

    def _optional(self, v: Vectors, given: Any, name: int, offset: ir.Value, kept: ir.Value) -> ir.Value:
        """What lies there in the lanes kept; zeros in all where the base is 0."""
        b, base = v.builder, given[name]
        there = b.icmp_signed("!=", base, WORD(0))
        mask = b.and_(kept, v.all_lanes(there))
        # Not from near 0 even where no lane is kept: processors take hundreds of cycles to see that it is no fault.
        from_ = b.inttoptr(b.select(there, b.add(base, offset), given[Y]), v.floats.as_pointer())
        return v.call(f"llvm.masked.load.v{v.lanes}f32.p0", v.floats, from_, INTEGER(1), mask, v.constant(0.0))


class _Quantised(_Tile):
    """Integers by integers, a group of inputs at a time; then their scales."""

    def __init__(self, target: Target, rows: int, packing: Packing) -> None:
        super().__init__(target, rows)
        self.packing = packing

    def totals(self, v: Vectors, given: Any, panel: ir.Value, row: ir.Value) -> Sequence[ir.Value]:
        b, packing, lanes = v.builder, self.packing, self.target.lanes
        integers = b.add(given[PANELS], b.mul(panel, given[PANEL_BYTES]))
        # The panel after this one is fetched meanwhile, its integers and its scales where this one's are read.
        ahead = given[PANEL_BYTES]
        read = self._scales(v, integers, given[INPUTS], ahead)
        of_row = [b.mul(b.add(row, WORD(number)), given[INPUTS]) for number in range(self.rows)]
        plane = b.mul(b.mul(given[ROWS], given[INPUTS]), WORD(BLOCK))
        planes = [given[X], b.add(given[X], plane)]
        xs = [[b.add(x, b.mul(start, WORD(BLOCK))) for x in planes] for start in of_row]
        steps = [b.add(given[SCALES], b.mul(start, WORD(4))) for start in of_row]
        sums = [b.add(given[SUMS], b.mul(start, WORD(4 * packing.parts))) for start in of_row]

        def block(index: ir.Value, *totals: ir.Value) -> Sequence[ir.Value]:
            here = b.add(integers, b.mul(index, WORD(packing.integer_bytes(lanes))))
            v.fetch(b.add(here, ahead), packing.integer_bytes(lanes))
            weights = _unpacked(v, here, packing.bits)
            scales, minima = read(index)
            x = [[b.add(start, b.mul(index, WORD(BLOCK))) for start in row] for row in xs]
            step = [v.all_lanes(v.load(b.add(start, b.mul(index, WORD(4))), FLOAT, 4)) for start in steps]
            found = list(totals)
            per_group = 8 // packing.parts
            for part in range(packing.parts):
                largest = 128 if packing.signed else 2**packing.bits - 1
                dots = [[Products(v, largest, packing.signed) for _ in planes] for _ in found]
                for vector in range(part * per_group, (part + 1) * per_group):
                    w = weights(vector)
                    for row_dots, starts in zip(dots, x, strict=True):
                        for products, start in zip(row_dots, starts, strict=True):
                            products.add(w, v.load(v.at(start, 4 * vector), INTEGER, 4))
                for number, row_dots in enumerate(dots):
                    of_x = b.mul(index, WORD(4 * packing.parts))
                    sum_x = v.all_lanes(v.load(v.at(b.add(sums[number], of_x), 4 * part), FLOAT, 4))
                    product = b.sitofp(self._total(v, row_dots), v.floats)
                    if packing.centre:
                        product = v.fma(product, step[number], b.fmul(sum_x, v.constant(-packing.centre)))
                    else:
                        product = b.fmul(product, step[number])
                    found[number] = v.fma(product, scales[part], found[number])
                    if packing.minimum:
                        found[number] = v.fma(minima[part], sum_x, found[number])
            return found

        return loop(b, given[INPUTS], [v.constant(0.0)] * self.rows, block)

    def _scales(self, v: Vectors, panel: ir.Value, blocks: ir.Value, ahead: ir.Value) -> Callable[[ir.Value], Fields]:
        """What reads a block's scales and minima, of each group."""
        b, packing, lanes = v.builder, self.packing, self.target.lanes
        start = b.add(panel, b.mul(blocks, WORD(packing.integer_bytes(lanes))))
        steps = b.add(start, b.mul(blocks, WORD(packing.scale_bytes(lanes))))

        def read(block: ir.Value) -> Fields:
            at = b.add(start, b.mul(block, WORD(packing.scale_bytes(lanes))))
            v.fetch(b.add(at, ahead), packing.scale_bytes(lanes))
            if not packing.steps:
                found = [load(v, "f16", v.at(at, 2 * lanes * number)) for number in range(packing.fields)]
                return found[: packing.parts], found[packing.parts :]
            superblock = b.lshr(block, WORD(SUPERBLOCK.bit_length() - 1))
            step = b.add(steps, b.mul(superblock, WORD(packing.step_bytes(lanes))))
            integers = [
                v.load(v.at(at, lanes * number), ir.VectorType(BYTE, lanes)) for number in range(packing.fields)
            ]
            # Scales of formats without minima have signs.
            numbers = [
                b.uitofp(integer, v.floats) if packing.minimum else b.sitofp(integer, v.floats) for integer in integers
            ]
            found = [
                b.fmul(number, load(v, "f16", v.at(step, 2 * lanes * (index // packing.parts))))
                for index, number in enumerate(numbers)
            ]
            return found[: packing.parts], found[packing.parts :]

        return read

    def _total(self, v: Vectors, dots: Sequence[Products]) -> ir.Value:
        high, low = (products.total() for products in dots)
        return v.builder.add(v.builder.mul(high, v.integer(HIGH)), low)


def _unpacked(v: Vectors, start: ir.Value, bits: int) -> Callable[[int], ir.Value]:
    """A block's vectors of integers by number, taken apart where they are asked for."""
    size = 4 * v.lanes

    def held(number: int) -> ir.Value:
        return v.load(v.at(start, size * number), v.bytes)

    if bits == 8:
        return held
    more = [held(4 + number) for number in range({4: 0, 5: 1, 6: 2}[bits])]

    def vector(number: int) -> ir.Value:
        low = v.fields(held(number // 2), 4 * (number % 2), 15)
        if bits == 4:
            return low
        shift = number - 4 if bits == 5 else 2 * (number % 4) - 4
        return v.builder.or_(low, v.fields(more[number // 4 if bits == 6 else 0], shift, 16 if bits == 5 else 48))

    return vector


class _Dense(_Tile):
    """Numbers by numbers, four inputs at a time, each with a sum of its own: a sum waits for its last product."""

    def __init__(self, target: Target, rows: int, format: str) -> None:
        super().__init__(target, rows)
        self.format = format

    def totals(self, v: Vectors, given: Any, panel: ir.Value, row: ir.Value) -> Sequence[ir.Value]:
        b, chains = v.builder, 4 if self.rows < 4 else 1
        size = v.lanes * (4 if self.format == "f32" else 2)
        weights = b.add(given[PANELS], b.mul(panel, given[PANEL_BYTES]))
        of_row = [b.mul(b.add(row, WORD(number)), given[INPUTS]) for number in range(self.rows)]
        xs = [b.add(given[X], b.mul(start, WORD(4))) for start in of_row]

        def inputs(index: ir.Value, count: int, totals: Sequence[ir.Value]) -> Sequence[ir.Value]:
            found = list(totals)
            for number in range(count):
                w = self._weights(v, v.at(b.add(weights, b.mul(index, WORD(size))), size * number))
                for place, start in enumerate(xs):
                    x = v.all_lanes(v.load(v.at(b.add(start, b.mul(index, WORD(4))), 4 * number), FLOAT, 4))
                    chain = place * chains + number % chains
                    found[chain] = v.fma(w, x, found[chain])
            return found

        fours = b.lshr(given[INPUTS], WORD(2))
        zeros = [v.constant(0.0)] * (self.rows * chains)
        totals = loop(b, fours, zeros, lambda index, *now: inputs(b.shl(index, WORD(2)), 4, now))
        rest, start = b.and_(given[INPUTS], WORD(3)), b.shl(fours, WORD(2))
        totals = loop(b, rest, totals, lambda index, *now: inputs(b.add(start, index), 1, now))
        return [_added(v, totals[place * chains : (place + 1) * chains]) for place in range(self.rows)]

    def _weights(self, v: Vectors, address: ir.Value) -> ir.Value:
        return load(v, self.format, address)


def _added(v: Vectors, parts: Sequence[ir.Value]) -> ir.Value:
    whole = parts[0]
    for part in parts[1:]:
        whole = v.builder.fadd(whole, part)
    return whole
