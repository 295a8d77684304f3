"""attention: which queries and which keys a part takes, and what becomes of the pieces of a sequence's keys.

Units of work are the pieces of a sequence's keys, the tiles of its queries, its kv heads. How many there are is counted
at each launch, and a part takes its share, so that parts are alike whatever the lengths are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import float32, int32, int64

from kernelmux_numba.attention import QUERIES, Shape
from kernelmux_numba.code import few_queries, query_tiles
from kernelmux_numba.code.convert import quantise
from kernelmux_numba.code.few_queries import width_of
from kernelmux_numba.code.memory import floats, inner, integers, small, word, words_at
from kernelmux_numba.code.pieces import (
    KEYS,
    LENGTHS,
    NOTHING,
    ROWS,
    SEQS,
    SHARE,
    STARTS,
    VALUES,
    WHOLE,
    WINDOW,
    Y_SCALES,
    Y_SUMS,
    Q,
    Y,
    common,
    cutting,
    joining,
    zeroing,
)
from kernelmux_numba.code.vectors import laid, stack
from kernelmux_numba.target import Target


def attend(target: Target, shape: Shape) -> Callable[[int, int], None]:
    """Every unit of work: to the end where a sequence is one piece, else what is found in each."""
    cut, few, many, zero = cutting(shape), _few(target, shape), _many(target, shape), zeroing(shape)
    group, kv_heads, most_few = shape.group, shape.kv_heads, shape.few(target)

    @inner
    def units_of(words: int, seq: int) -> int:
        starts = integers(word(words, STARTS))
        rows = int64(starts[seq + 1]) - int64(starts[seq])
        if rows <= 0:
            return 0
        if integers(word(words, LENGTHS))[seq] <= 0:
            return 1
        return cut(words, seq)[2] * ((rows * group + QUERIES - 1) // QUERIES) * kv_heads

    @inner
    def unit(words: int, seq: int, index: int) -> None:
        starts = integers(word(words, STARTS))
        start, rows = int64(starts[seq]), int64(starts[seq + 1]) - int64(starts[seq])
        length = int64(integers(word(words, LENGTHS))[seq])
        if length <= 0:
            zero(words, start, start + rows)
            return
        tiles = (rows * group + QUERIES - 1) // QUERIES
        head, rest = index % kv_heads, index // kv_heads
        tile, piece = rest % tiles, rest // tiles
        first, keys, pieces = cut(words, seq)
        if pieces > 1:
            first, last = first + piece * keys, min(first + (piece + 1) * keys, length)
        else:
            window, before = word(words, WINDOW), length - rows
            last = before + min(rows, ((tile + 1) * QUERIES - 1) // group + 1)
            first = max(0, before + tile * QUERIES // group + 1 - window) if window else 0
        if rows * group <= most_few:
            few(words, seq, head, first, last, piece, pieces)
        else:
            many(words, seq, head, tile, first, last, piece, pieces)

    def run(words: int, part: int) -> None:
        seqs, parts = word(words, SEQS), word(words, SHARE)
        total = int64(0)
        for seq in range(seqs):
            total += units_of(words, seq)
        first, last = total * part // parts, total * (part + 1) // parts
        if part == 0:
            zero(words, int64(integers(word(words, STARTS))[seqs]), word(words, ROWS))
        before = int64(0)
        for seq in range(seqs):
            if before >= last:
                break
            count = units_of(words, seq)
            for index in range(max(first - before, 0), min(last - before, count)):
                unit(words, seq, index)
            before += count

    return run


def gather(target: Target, shape: Shape) -> Callable[[int, int], None]:
    """What the pieces of a sequence have found becomes one; rows whose blocks span heads are put in blocks."""
    cut, joined = cutting(shape), joining(target, shape)
    heads, dim, whole_rows = shape.heads, shape.dim, shape.whole_rows
    items_of_row = 1 if whole_rows else heads
    blocks = heads * dim // 32

    def run(words: int, part: int) -> None:
        starts, seqs = integers(word(words, STARTS)), word(words, SEQS)
        first = part * word(words, SHARE)
        last = min(first + word(words, SHARE), word(words, ROWS) * items_of_row)
        seq = int64(0)
        for item in range(first, last):
            row = item // items_of_row
            while seq < seqs and row >= starts[seq + 1]:
                seq += 1
            if seq == seqs:
                return
            if integers(word(words, LENGTHS))[seq] <= 0:
                continue
            pieces = cut(words, seq)[2]
            if pieces > 1:
                for head in range(item % items_of_row, heads if whole_rows else item % items_of_row + 1):
                    joined(words, seq, row, head, pieces)
            if whole_rows:
                values = word(words, WHOLE) + 4 * row * heads * dim
                for block in range(blocks):
                    quantise(
                        floats(values + 128 * block),
                        small(word(words, Y)),
                        floats(word(words, Y_SCALES)),
                        floats(word(words, Y_SUMS)),
                        row * blocks + block,
                    )

    return run


def _few(target: Target, shape: Shape) -> Any:
    """One piece of a sequence's keys for all its queries of one kv head: a vector is columns."""
    lanes, most, held = target.lanes, shape.few(target), few_queries.KEYS
    heads, group, dim, width = shape.heads, shape.group, shape.dim, width_of(target, shape.dim)
    many, of_many, fewer, of_fewer = few_queries.blocks(group)
    take, weigh = laid(target, few_queries.taken(shape)), laid(target, few_queries.weighed(shape))
    score, mix = (laid(target, lay(shape, of_many)) for lay in (few_queries.scored, few_queries.mixed))
    score_fewer, mix_fewer = (
        (laid(target, lay(shape, of_fewer)) for lay in (few_queries.scored, few_queries.mixed))
        if fewer
        else (score, mix)
    )
    divide, keep = (laid(target, few_queries.divided(shape, normal)) for normal in (True, False))
    offsets, put, found_at, sees = common(target, shape)
    # What lies where in a call's own memory.
    queries = 0
    sums = queries + 4 * most * width
    scores = sums + 4 * most * width
    places = scores + 4 * most * held
    scales = places + 8 * held
    state = scales + 8 * held
    result = state + 12 * most + 64
    memory = stack(result + 4 * width)

    @inner
    def few(words: int, seq: int, head: int, first: int, last: int, piece: int, pieces: int) -> None:
        at = memory()
        starts = integers(word(words, STARTS))
        start, rows = int64(starts[seq]), int64(starts[seq + 1]) - int64(starts[seq])
        summed, states = floats(at + sums), floats(at + state)
        for query in range(rows * group):
            of_query = (start + query // group) * heads + head * group + query % group
            take(word(words, Q) + 4 * dim * of_query, at + queries + 4 * width * query)
            states[query], states[most + query] = float32(NOTHING), float32(0)
        for index in range(rows * group * width):
            summed[index] = float32(0)
        for key in range(first, last, held):
            count = min(held, last - key)
            end = (count + lanes - 1) // lanes * lanes
            offsets(words, seq, head, key, count, end, at + places, at + scales, held)
            for block in range(0, end, lanes):
                of_block = at + places + 8 * block
                for row in range(rows):
                    query = row * group
                    for _ in range(many):
                        to = at + scores + 4 * (held * query + block)
                        score(at + queries + 4 * width * query, of_block, word(words, KEYS), to)
                        query += of_many
                    for _ in range(fewer):
                        to = at + scores + 4 * (held * query + block)
                        score_fewer(at + queries + 4 * width * query, of_block, word(words, KEYS), to)
                        query += of_fewer
            for query in range(rows * group):
                low, high = sees(words, seq, query // group)
                low, high = max(low - key, 0), min(high + 1 - key, count)
                weigh(at + scores + 4 * held * query, low, high, end, at + state + 4 * query, at + scales)
            for row in range(rows):
                query = row * group
                for _ in range(many):
                    of_query, weights = at + sums + 4 * width * query, at + scores + 4 * held * query
                    mix(of_query, weights, at + places, word(words, VALUES), count, at + state + 4 * (2 * most + query))
                    query += of_many
                for _ in range(fewer):
                    of_query, weights = at + sums + 4 * width * query, at + scores + 4 * held * query
                    factors = at + state + 4 * (2 * most + query)
                    mix_fewer(of_query, weights, at + places, word(words, VALUES), count, factors)
                    query += of_fewer
        for query in range(rows * group):
            of_query, total = at + sums + 4 * width * query, at + state + 4 * (most + query)
            row, of_row = query // group, head * group + query % group
            if pieces == 1:
                divide(of_query, total, at + result)
                put(words, start + row, of_row, at + result)
            else:
                to = found_at(words, start + row, of_row, piece)
                keep(of_query, total, to)
                floats(to)[width], floats(to)[width + 1] = states[query], states[most + query]

    return few


def _many(target: Target, shape: Shape) -> Any:
    """Keys of a sequence for a tile of its queries of one kv head: a vector is queries."""
    lanes, held, rows_at_once = target.lanes, query_tiles.KEYS, query_tiles.at_once(target)
    heads, group, dim, width = shape.heads, shape.group, shape.dim, width_of(target, shape.dim)
    pair = 2 * lanes
    take, widen, score, mix, weigh = (
        laid(target, lay(shape))
        for lay in (query_tiles.taken, query_tiles.widened, query_tiles.scored, query_tiles.mixed, query_tiles.weighed)
    )
    divide, keep = (laid(target, query_tiles.divided(shape, normal)) for normal in (True, False))
    offsets, put, found_at, sees = common(target, shape)
    # What lies where in a call's own memory.
    queries = 0
    sums = queries + 4 * QUERIES * width
    scores = sums + 4 * QUERIES * width
    cached = scores + 4 * QUERIES * held
    results = cached + 4 * held * width
    addresses = results + 4 * lanes * width
    places = addresses + 8 * QUERIES
    scales = places + 8 * held
    seen = scales + 8 * held
    state = seen + 8 * QUERIES
    memory = stack(state + 12 * QUERIES)

    @inner
    def begin(words: int, at: int, seq: int, head: int, tile: int, count: int, ends: int) -> None:
        """Queries become lanes; those beyond `count` see nothing."""
        start = int64(integers(word(words, STARTS))[seq])
        from_, states, bounds = words_at(at + addresses), floats(at + state), integers(at + seen)
        for lane in range(ends):
            query = tile * QUERIES + min(lane, count - 1)
            of_query = (start + query // group) * heads + head * group + query % group
            from_[lane] = word(words, Q) + 4 * dim * of_query
            low, high = sees(words, seq, query // group)
            bounds[lane] = int32(high) if lane < count else int32(-1)
            bounds[QUERIES + lane] = int32(low)
            states[lane], states[QUERIES + lane] = float32(NOTHING), float32(0)
        for vector in range(ends // lanes):
            to = 4 * width * pair * (vector // 2) + 4 * lanes * (vector % 2)
            take(at + addresses + 8 * lanes * vector, at + queries + to)
        summed = floats(at + sums)
        for index in range(ends * width):
            summed[index] = float32(0)

    @inner
    def many(words: int, seq: int, head: int, tile: int, first: int, last: int, piece: int, pieces: int) -> None:
        at = memory()
        starts = integers(word(words, STARTS))
        start, rows = int64(starts[seq]), int64(starts[seq + 1]) - int64(starts[seq])
        queries_here = min(QUERIES, rows * group - tile * QUERIES)
        pairs = (queries_here + pair - 1) // pair
        begin(words, at, seq, head, tile, queries_here, pairs * pair)
        for key in range(first, last, held):
            count = min(held, last - key)
            offsets(words, seq, head, key, count, count, at + places, at + scales, held)
            widen(at + places, word(words, KEYS), at + scales, count, at + cached)
            for number in range(pairs):
                of_pair = min((number + 1) * pair, queries_here) - 1
                some = min(count, sees(words, seq, (tile * QUERIES + of_pair) // group)[1] + 1 - key)
                to = at + scores + 4 * held * pair * number
                for block in range(0, some, rows_at_once):
                    score(
                        at + queries + 4 * width * pair * number, at + cached + 4 * width * block, to + 4 * pair * block
                    )
                if some > 0:
                    weigh(to, some, key, at + seen + 4 * pair * number, at + state + 4 * pair * number)
            widen(at + places, word(words, VALUES), at + scales + 4 * held, count, at + cached)
            for number in range(pairs):
                of_pair = min((number + 1) * pair, queries_here) - 1
                some = min(count, sees(words, seq, (tile * QUERIES + of_pair) // group)[1] + 1 - key)
                if some > 0:
                    for column in range(0, width, rows_at_once):
                        mix(
                            at + scores + 4 * held * pair * number,
                            at + cached + 4 * column,
                            some,
                            at + sums + 4 * pair * (width * number + column),
                            at + state + 4 * (2 * QUERIES + pair * number),
                        )
        states = floats(at + state)
        for vector in range((queries_here + lanes - 1) // lanes):
            from_ = at + sums + 4 * (width * pair * (vector // 2) + lanes * (vector % 2))
            totals = at + state + 4 * (QUERIES + lanes * vector)
            if pieces == 1:
                divide(from_, totals, at + results)
            else:
                keep(from_, totals, at + results)
            for lane in range(min(lanes, queries_here - lanes * vector)):
                query = tile * QUERIES + lanes * vector + lane
                row, of_row = start + query // group, head * group + query % group
                if pieces == 1:
                    put(words, row, of_row, at + results + 4 * width * lane)
                else:
                    found = floats(found_at(words, row, of_row, piece))
                    result = floats(at + results + 4 * width * lane)
                    for column in range(width):
                        found[column] = result[column]
                    found[width] = states[lanes * vector + lane]
                    found[width + 1] = states[QUERIES + lanes * vector + lane]

    return many
