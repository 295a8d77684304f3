"""Products of activations in integers with panels of quantised weights, and of float32 with panels of dense ones.

Each lane of a vector sums an output of its own, so that nothing is added across lanes. Some rows are multiplied at
once, so that a panel's integers are unpacked once for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from kernelmux_numba.code.dots import Sums, dots_of
from kernelmux_numba.code.memory import word
from kernelmux_numba.code.numbers import load
from kernelmux_numba.code.vectors import BYTE, FLOAT, INTEGER, WORD, Vectors, laid, loop
from kernelmux_numba.packing import BLOCK, SUPERBLOCK, Packing, panels_at_once
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
    """Products with weights packed so, of activations that are integers of 16 bits (`convert.sixteen_bits`)."""
    return _by_tiles(target, panels_at_once(target), lambda rows, panels: _Quantised(target, rows, panels, packing))


def dense(target: Target, format: str) -> Callable[[int, int], None]:
    """Products with weights in panels of plain numbers."""
    return _by_tiles(target, 1, lambda rows, panels: _Dense(target, rows, panels, format))


def one_row(target: Target, packing: Packing) -> Any:
    """One row by one panel of weights packed so: a function of a product's words, the panel and the row."""
    return _Quantised(target, 1, 1, packing).laid()


def _by_tiles(target: Target, panels: int, tile_of: Callable[[int, int], _Tile]) -> Callable[[int, int], None]:
    """A part's panels, some at a time, each by all rows: as many at once as there is a tile for, then fewer."""
    lanes, (many, some, two) = target.lanes, AT_MOST[target.lanes]
    by_many, by_some, by_two = (tile_of(rows, panels).laid() for rows in (many, some, two))
    # A panel of weights, and the next that is fetched meanwhile, fill the first level of caches where rows are long.
    by_one = tile_of(1, 1).laid()

    def product(words: int, part: int) -> None:
        first = part * word(words, AT_ONCE)
        last = min(first + word(words, AT_ONCE), (word(words, OUTPUTS) + lanes - 1) // lanes)
        rows = word(words, ROWS)
        for panel in range(first, last, panels):
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
                for one in range(panel, min(panel + panels, last)):
                    by_one(words, one, row)

    return product


class _Tile(ABC):
    """Some rows by some panels."""

    def __init__(self, target: Target, rows: int, panels: int) -> None:
        self.target, self.rows, self.panels = target, rows, panels

    def laid(self) -> Any:
        """The tile as a function of the words, the first panel and the first row."""
        return laid(self.target, self._lay)

    @abstractmethod
    def totals(self, v: Vectors, given: Any, panels: Sequence[ir.Value], row: ir.Value) -> Sequence[ir.Value]:
        """A vector of sums for each row and panel, all of a row's together."""

    def _lay(self, v: Vectors, words: ir.Value, first: ir.Value, row: ir.Value) -> None:
        b, lanes = v.builder, self.target.lanes
        given = [v.load(v.at(words, 8 * index), WORD, 8) for index in range(AT_ONCE)]
        last = b.ashr(b.sub(given[OUTPUTS], WORD(1)), WORD(lanes.bit_length() - 1))
        panels = [b.add(first, WORD(number)) for number in range(self.panels)]
        there = [b.icmp_signed("<=", panel, last) for panel in panels]
        # Beyond the last there is none: that one is multiplied again, for nobody.
        totals = self.totals(
            v, given, [b.select(is_there, panel, last) for is_there, panel in zip(there, panels, strict=True)], row
        )
        for place, panel in enumerate(panels):
            with b.if_then(there[place]):
                self._put(v, given, panel, row, totals[place :: self.panels])

    def _put(self, v: Vectors, given: Any, panel: ir.Value, row: ir.Value, totals: Sequence[ir.Value]) -> None:
        """A panel's sums of each row."""
        b, lanes = v.builder, self.target.lanes
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

    def __init__(self, target: Target, rows: int, panels: int, packing: Packing) -> None:
        super().__init__(target, rows, panels)
        self.packing = packing

    def totals(self, v: Vectors, given: Any, panels: Sequence[ir.Value], row: ir.Value) -> Sequence[ir.Value]:
        b, packing, lanes = v.builder, self.packing, self.target.lanes
        dots = dots_of(self.target, packing)
        starts = [b.add(given[PANELS], b.mul(panel, given[PANEL_BYTES])) for panel in panels]
        # The panels after these are fetched meanwhile, their integers and their scales where these are read.
        ahead = b.mul(given[PANEL_BYTES], WORD(self.panels))
        reads = [self._scales(v, start, given[INPUTS], ahead) for start in starts]
        of_row = [b.mul(b.add(row, WORD(number)), given[INPUTS]) for number in range(self.rows)]
        plane = b.mul(b.mul(given[ROWS], given[INPUTS]), WORD(BLOCK))
        planes = [b.add(given[X], b.mul(plane, WORD(number))) for number in range(dots.planes)]
        xs = [[b.add(x, b.mul(start, WORD(dots.block_bytes))) for x in planes] for start in of_row]
        steps = [b.add(given[SCALES], b.mul(start, WORD(4))) for start in of_row]
        sums = [b.add(given[SUMS], b.mul(start, WORD(4 * packing.parts))) for start in of_row]

        def block(index: ir.Value, *totals: ir.Value) -> Sequence[ir.Value]:
            weights = []
            for start in starts:
                here = b.add(start, b.mul(index, WORD(packing.integer_bytes(lanes))))
                v.fetch(b.add(here, ahead), packing.integer_bytes(lanes))
                weights.append(dots.unpacked(v, here))
            fields = [read(index) for read in reads]
            x = [[b.add(start, b.mul(index, WORD(dots.block_bytes))) for start in row] for row in xs]
            step = [v.all_lanes(v.load(b.add(start, b.mul(index, WORD(4))), FLOAT, 4)) for start in steps]
            found = list(totals)
            per_group = dots.vectors // packing.parts
            for part in range(packing.parts):
                sums_of = [Sums(v, dots) for _ in found]
                for vector in range(part * per_group, (part + 1) * per_group):
                    ws = [unpacked(vector) for unpacked in weights]
                    for number, starts_of_row in enumerate(x):
                        four = [v.all_lanes(v.load(v.at(start, 4 * vector), INTEGER, 4)) for start in starts_of_row]
                        for place, w in enumerate(ws):
                            sums_of[number * self.panels + place].add(w, four)
                    dots.keep_order(v, sums_of)
                of_x = b.mul(index, WORD(4 * packing.parts))
                for number in range(self.rows):
                    sum_x = v.all_lanes(v.load(v.at(b.add(sums[number], of_x), 4 * part), FLOAT, 4))
                    for place, (scales, minima) in enumerate(fields):
                        chain = number * self.panels + place
                        product = b.sitofp(sums_of[chain].total(), v.floats)
                        if packing.centre:
                            product = v.fma(product, step[number], b.fmul(sum_x, v.constant(-packing.centre)))
                        else:
                            product = b.fmul(product, step[number])
                        found[chain] = v.fma(product, scales[part], found[chain])
                        if packing.minimum:
                            found[chain] = v.fma(minima[part], sum_x, found[chain])
            return found

        return loop(b, given[INPUTS], [v.constant(0.0)] * (self.rows * self.panels), block)

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


class _Dense(_Tile):
    """Numbers by numbers, four inputs at a time, each with a sum of its own: a sum waits for its last product."""

    def __init__(self, target: Target, rows: int, panels: int, format: str) -> None:
        super().__init__(target, rows, panels)
        self.format = format

    def totals(self, v: Vectors, given: Any, panels: Sequence[ir.Value], row: ir.Value) -> Sequence[ir.Value]:
        (panel,) = panels
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
