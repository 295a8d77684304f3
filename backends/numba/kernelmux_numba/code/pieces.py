"""The pieces of a sequence's keys, for few queries of attention and for many: where they lie, what a row sees of them,
and where what is found goes.

Enters: a Shape. Leaves: functions of the words of a launch.
"""

from __future__ import annotations

from typing import Any

from numba import float32, int64

from kernelmux_numba.attention import PIECE, QUERIES, Shape
from kernelmux_numba.code.cached import BYTES
from kernelmux_numba.code.convert import quantise
from kernelmux_numba.code.few_queries import width_of
from kernelmux_numba.code.memory import floats, inner, integers, narrow, small, word, words_at
from kernelmux_numba.code.numbers import ITEM_BYTES, writer
from kernelmux_numba.code.powers import power
from kernelmux_numba.code.vectors import stack, unary
from kernelmux_numba.target import Target

# The words that attention's functions are given.
Q, KEYS, KEY_SCALES, VALUES, VALUE_SCALES, STARTS, LENGTHS, TABLE = range(8)
"""The queries; the cache, its scales or 0; each sequence's first row, and the end of the last; lengths; pages."""
SEQS, ROWS, WIDTH, PAGE, WINDOW = range(8, 13)
"""Sequences, rows, pages of a row of the table, positions of a page, positions that a row sees or 0."""
Y, Y_SCALES, Y_SUMS, FOUND, PIECES, WHOLE, SHARE = range(13, 20)
"""Results in their planes; what is found in pieces, pieces at most; rows not yet in blocks; parts, or how many things
a part has."""
NOTHING = float("-inf")


def common(target: Target, shape: Shape) -> tuple[Any, Any, Any, Any]:
    """Where keys are, what writes a result, where what a piece finds is kept, what a row sees."""
    return placing(shape), putting(target, shape), finding(target, shape), seeing(shape)


def cutting(shape: Shape) -> Any:
    """The first key of a sequence that is seen, the keys of a piece, and the pieces."""
    group = shape.group

    @inner
    def cut(words: int, seq: int) -> tuple[int, int, int]:
        starts = integers(word(words, STARTS))
        rows = int64(starts[seq + 1]) - int64(starts[seq])
        length, window = int64(integers(word(words, LENGTHS))[seq]), word(words, WINDOW)
        first = max(int64(0), length - rows + 1 - window) if window else int64(0)
        seen = length - first
        if rows > 1 and rows * group > QUERIES:
            return first, seen, int64(1)
        pieces = max(int64(1), min(word(words, PIECES), (seen + PIECE - 1) // PIECE))
        keys = ((seen + pieces - 1) // pieces + 15) // 16 * 16
        return first, keys, (seen + keys - 1) // keys

    return cut


def placing(shape: Shape) -> Any:
    """Where keys are in the cache, in bytes from its start, and their scales and their values'."""
    kv_heads, dim, size, scaled = shape.kv_heads, shape.dim, shape.dim * BYTES[shape.format], shape.format == "fp8_row"

    @inner
    def offsets(
        words: int, seq: int, head: int, key: int, count: int, end: int, to: int, scales: int, apart: int
    ) -> None:
        places, pages, page = words_at(to), integers(word(words, TABLE)), word(words, PAGE)
        table = seq * word(words, WIDTH)
        done = int64(0)
        while done < count:
            number = (key + done) // page
            within = key + done - number * page
            several = min(page - within, count - done)
            slot = int64(pages[table + number]) * page + within
            for index in range(several):
                places[done + index] = ((slot + index) * kv_heads + head) * size
            done += several
        # Whole vectors of keys: the last one again, for nobody may look beyond a sequence's end.
        for index in range(count, end):
            places[index] = places[count - 1]
        if scaled:
            of_keys, of_values = floats(word(words, KEY_SCALES)), floats(word(words, VALUE_SCALES))
            kept = floats(scales)
            for index in range(end):
                kept[index] = of_keys[places[index] // dim]
                kept[apart + index] = of_values[places[index] // dim]

    return offsets


def seeing(shape: Shape) -> Any:
    """The first and the last position that a row of a sequence sees."""

    @inner
    def sees(words: int, seq: int, row: int) -> tuple[int, int]:
        starts = integers(word(words, STARTS))
        rows = int64(starts[seq + 1]) - int64(starts[seq])
        last = int64(integers(word(words, LENGTHS))[seq]) - rows + row
        window = word(words, WINDOW)
        return max(int64(0), last + 1 - window) if window else int64(0), last

    return sees


def finding(target: Target, shape: Shape) -> Any:
    """Where what is found in a piece for one query is kept."""
    heads, size = shape.heads, shape.found_floats(target.lanes)

    @inner
    def found_at(words: int, row: int, head: int, piece: int) -> int:
        return word(words, FOUND) + 4 * size * ((row * heads + head) * word(words, PIECES) + piece)

    return found_at


def putting(target: Target, shape: Shape) -> Any:
    """Writes one head's result of a row."""
    heads, dim, blocks = shape.heads, shape.dim, shape.dim // 32
    place = WHOLE if shape.whole_rows else Y
    in_blocks = shape.output == "q8_32" and not shape.whole_rows
    # Rows that are not yet in blocks are float32.
    format = "f32" if shape.output == "q8_32" else shape.output
    item, write = ITEM_BYTES[format], writer(target, format)

    @inner
    def put(words: int, row: int, head: int, values: int) -> None:
        of_head = row * heads + head
        if in_blocks:
            qs, scales, sums = small(word(words, Y)), floats(word(words, Y_SCALES)), floats(word(words, Y_SUMS))
            for block in range(blocks):
                quantise(floats(values + 128 * block), qs, scales, sums, of_head * blocks + block)
        else:
            y, result = word(words, place) + item * dim * of_head, floats(values)
            for column in range(dim):
                write(y + item * column, result[column])

    return put


def zeroing(shape: Shape) -> Any:
    """Makes rows zero, from one to before another."""
    columns, quantised, half = shape.heads * shape.dim, shape.output == "q8_32", shape.output == "bf16"

    @inner
    def zero(words: int, first: int, last: int) -> None:
        if quantised:
            qs, scales, sums = small(word(words, Y)), floats(word(words, Y_SCALES)), floats(word(words, Y_SUMS))
            for index in range(first * columns, last * columns):
                qs[index] = 0
            for index in range(first * columns // 32, last * columns // 32):
                scales[index] = sums[index] = float32(0)
        elif half:
            bits = narrow(word(words, Y))
            for index in range(first * columns, last * columns):
                bits[index] = 0
        else:
            y = floats(word(words, Y))
            for index in range(first * columns, last * columns):
                y[index] = float32(0)

    return zero


def joining(target: Target, shape: Shape) -> Any:
    """One head's result of a row from what its pieces have found."""
    width, dim, size = width_of(target, shape.dim), shape.dim, shape.found_floats(target.lanes)
    found_at, put, memory, raised = finding(target, shape), putting(target, shape), stack(4 * width), unary(power)

    @inner
    def joined(words: int, seq: int, row: int, head: int, pieces: int) -> None:
        at = memory()
        found, result = floats(found_at(words, row, head, 0)), floats(at)
        most = float32(NOTHING)
        for piece in range(pieces):
            most = max(most, found[piece * size + width])
        base = most if most > float32(NOTHING) else float32(0)
        for column in range(width):
            result[column] = float32(0)
        total = float32(0)
        for piece in range(pieces):
            weight = raised(found[piece * size + width] - base)
            total += weight * found[piece * size + width + 1]
            for column in range(width):
                result[column] += weight * found[piece * size + column]
        for column in range(dim):
            result[column] /= total
        put(words, row, head, at)

    return joined
