"""The program of decode.py: work dealt to programs, attention over paged tiles, and what several found weighed."""

from __future__ import annotations

import triton
import triton.language as tl

from kernelmux_triton.attention_cache import (
    LOG2E,
    add_values,
    capped,
    fade,
    first_seen,
    joined,
    nothing_seen,
    pages_of,
    score,
    split_queries,
    with_sink,
)


@triton.jit(do_not_specialize=["rows", "sequences", "width"])
def attend(
    q, y, found, weights, spans, k_cache, k_scales, v_cache, v_scales, sinks, query_start, kv_len, block_table, rows,
    sequences, width,
    SCALE: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, WIDE: tl.constexpr, PACK: tl.constexpr,
    TALL: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, SEQUENCES: tl.constexpr,
    SCALED: tl.constexpr, LOW: tl.constexpr, ASSEMBLED: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Attends for y [rows, HEADS * DIM]; each key and value of the cache is read once by each TALL / PACK rows.

    Work items, in order: for each kv head, blocks of up to TALL / PACK rows of one sequence, named by the first; and
    the tiles of TILE positions that these see. Program i of n takes the i-th n-th of all tiles. Row r of the tile of
    queries is row r // PACK of the block and head r % PACK of the group. found [2 n, TALL, DIM] and weights [2 n, TALL,
    2], the largest score and the sum of weights, are what programs find of items that they share: first place for an
    item begun by another, second for one that another ends. spans [rows, KV_HEADS, 3] are the first and the last
    program of each row's item and where in TALL the row begins; a row that sees nothing has no second program.
    """
    block: tl.constexpr = TALL // PACK
    group: tl.constexpr = HEADS // KV_HEADS
    program = tl.program_id(0)
    if tl.num_programs(0) % KV_HEADS == 0:
        # Neighbours read the same positions at once, each those of its own head: they lie beside each other.
        program = program % KV_HEADS * (tl.num_programs(0) // KV_HEADS) + program // KV_HEADS
    index = tl.arange(0, ROWS)
    owner = _owners(index, query_start, sequences, ROWS, SEQUENCES)
    known = (index < rows) & (owner < sequences) & (index >= tl.load(query_start))
    own = tl.minimum(owner, sequences - 1)
    end = tl.load(kv_len + own) - (tl.load(query_start + own + 1) - 1 - index)
    leads = (index - tl.load(query_start + own)) % block == 0
    tiles = _seen(index, own, query_start, kv_len, WINDOW, CHUNK, block, TILE)[2]
    units = tl.where(known & leads, tiles, 0).to(tl.int64)
    ends = tl.cumsum(units, axis=0)
    head_units = tl.sum(units, axis=0)
    total_units = head_units * KV_HEADS

    for row in range(program, rows, tl.num_programs(0)):
        if tl.sum((index == row) & known & (end > 0), axis=0) == 0:
            for kv_head in range(KV_HEADS):
                tl.store(spans + 3 * (row * KV_HEADS + kv_head), 0)
                tl.store(spans + 3 * (row * KV_HEADS + kv_head) + 1, 0)
            for start in range(0, HEADS * DIM, 1024):
                blank = start + tl.arange(0, 1024)
                at = row * (HEADS * DIM) + blank
                tl.store(y + at, tl.zeros([1024], y.dtype.element_ty), mask=blank < HEADS * DIM)

    active = tl.minimum(tl.num_programs(0).to(tl.int64), total_units)
    unit, stop_unit = total_units, total_units
    if program < active:
        unit = program * total_units // active
        stop_unit = (program + 1) * total_units // active

    tall, column = tl.arange(0, TALL), tl.arange(0, WIDE)
    # Numbers of a head as they are loaded: of e4m3 pairs.
    held: tl.constexpr = DIM // 2 if SCALED else DIM
    held_column = tl.arange(0, WIDE // 2 if SCALED else WIDE)
    member = tall % PACK
    while unit < stop_unit:
        kv_head = (unit // head_units).to(tl.int32)
        within = unit % head_units
        row = tl.sum((ends <= within).to(tl.int32), axis=0)
        here = index == row
        sequence = tl.sum(tl.where(here, own, 0), axis=0)
        tile = (within - tl.sum(tl.where(here, ends - units, 0), axis=0)).to(tl.int32)
        begin, block_end, row_tiles = _seen(row, sequence, query_start, kv_len, WINDOW, CHUNK, block, TILE)
        take = tl.minimum(row_tiles - tile, (stop_unit - unit).to(tl.int32))

        last_row = tl.minimum(tl.load(query_start + sequence + 1), row + block) - 1
        query_row = row + tall // PACK
        kept = (member < group) & (query_row <= last_row)
        sees = tl.where(kept, block_end - (last_row - query_row), block_end)
        head = query_row.to(tl.int64) * HEADS + kv_head * group + member
        inside = kept[:, None] & (column < DIM)[None, :]
        queries = tl.load(q + head[:, None] * DIM + column[None, :], mask=inside, other=0.0)

        kind: tl.constexpr = tl.bfloat16 if SCALED else k_cache.dtype.element_ty
        halved = split_queries(queries, kind, SCALED)
        peak, total, sums, odd_sums = nothing_seen(TALL, WIDE, SCALED)
        table = block_table + sequence.to(tl.int64) * width
        first = begin + tile * TILE
        pages = pages_of(table, first, block_end, PAGE, TILE)
        for step in tl.range(0, take, num_stages=STAGES):
            start = first + step * TILE
            position = start + tl.arange(0, TILE)
            slot = pages.to(tl.int64) * PAGE + position % PAGE
            # Ahead of the loads that need them.
            pages = pages_of(table, start + TILE, block_end, PAGE, TILE)
            valid = position < block_end
            at = slot * KV_HEADS + kv_head
            place = at[:, None] * held + held_column[None, :]
            there = valid[:, None] & (held_column < held)[None, :]
            keys = tl.load(k_cache + place, mask=there, other=0)
            scores = capped(score(halved, keys, k_scales, at, valid, SCALED, LOW, ASSEMBLED), SCALE, CAP)
            visible = position[None, :] < sees[:, None]
            if WINDOW > 0 or CHUNK > 0:
                visible = visible & (position[None, :] >= first_seen(sees, WINDOW, CHUNK)[:, None])
            peak, faded, each = fade(peak, tl.where(visible, scores * LOG2E, float("-inf")), 1.0, True)
            total = total * faded + tl.sum(each, axis=1)
            values = tl.load(v_cache + place, mask=there, other=0)
            sums, odd_sums = add_values(
                sums, odd_sums, faded, each, values, v_scales, at, valid, SCALED, ASSEMBLED
            )  # fmt: skip
        weighted = joined(sums, odd_sums, SCALED)

        if take == row_tiles:
            total = with_sink(peak, total, sinks, kv_head * group + member, kept, SINKS)
            mixed = weighted * (1 / tl.where(total > 0, total, 1.0))[:, None]
            tl.store(y + head[:, None] * DIM + column[None, :], mixed.to(y.dtype.element_ty), mask=inside)
        else:
            place = (2 * program + (tile == 0).to(tl.int32)) * TALL + tall
            tl.store(found + place[:, None] * DIM + column[None, :], weighted, mask=inside)
            tl.store(weights + 2 * place, peak, mask=kept)
            tl.store(weights + 2 * place + 1, total, mask=kept)
        span = spans + 3 * (query_row * KV_HEADS + kv_head)
        names = kept & (member == 0) & (sees > 0)
        if tile == 0:
            tl.store(span, member * 0 + program, mask=names)
            tl.store(span + 2, tall, mask=names)
        if tile + take == row_tiles:
            tl.store(span + 1, member * 0 + program, mask=names)
        unit += take


@triton.jit
def weigh(
    y, found, weights, spans, sinks,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, TALL: tl.constexpr,
    PIECES: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One head [DIM] of one row of y a program, from what each of several programs found, in order.

    Grid: rows by HEADS. PIECES of them are read at once; where one program found all, y is there already.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    group: tl.constexpr = HEADS // KV_HEADS
    span = spans + 3 * (row * KV_HEADS + head // group)
    opens, closes = tl.load(span), tl.load(span + 1)
    if opens < closes:
        tall = tl.load(span + 2) + head % group
        column = tl.arange(0, WIDE)
        peak, total = float("-inf"), 0.0
        mixed = tl.zeros([WIDE], tl.float32)
        for first in range(opens, closes + 1, PIECES):
            piece = first + tl.arange(0, PIECES)
            at = (2 * piece + (piece == opens).to(tl.int32)) * TALL + tall
            there = piece <= closes
            inside = there[:, None] & (column < DIM)[None, :]
            sums = tl.load(found + at[:, None] * DIM + column[None, :], mask=inside, other=0.0)
            peaks = tl.load(weights + 2 * at, mask=there, other=float("-inf"))
            totals = tl.load(weights + 2 * at + 1, mask=there, other=0.0)
            higher = tl.maximum(peak, tl.max(peaks, axis=0))
            level = tl.where(higher == float("-inf"), 0.0, higher)
            shares, faded = tl.exp2(peaks - level), tl.exp2(peak - level)
            total = total * faded + tl.sum(totals * shares, axis=0)
            mixed = mixed * faded + tl.sum(sums * shares[:, None], axis=0)
            peak = higher
        total = with_sink(peak, total, sinks, head, True, SINKS)
        mixed = mixed / tl.where(total > 0, total, 1.0)
        into = y + (row.to(tl.int64) * HEADS + head) * DIM + column
        tl.store(into, mixed.to(y.dtype.element_ty), mask=column < DIM)


@triton.jit
def _owners(row, query_start, sequences, ROWS: tl.constexpr, SEQUENCES: tl.constexpr):
    """The sequence of each row [ROWS]: as many as end at or before it."""
    before = tl.zeros([ROWS], tl.int32)
    for start in range(0, sequences, SEQUENCES):
        sequence = start + tl.arange(0, SEQUENCES)
        there = sequence < sequences
        stops = tl.load(query_start + 1 + sequence, mask=there, other=0)
        before += tl.sum((there[None, :] & (stops[None, :] <= row[:, None])).to(tl.int32), axis=1)
    return before


@triton.jit
def _seen(
    row, sequence, query_start, kv_len, WINDOW: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Of the block that a row leads, or each of several rows: its first tile's start, the end, the number of tiles."""
    stop = tl.load(query_start + sequence + 1)
    before = tl.load(kv_len + sequence) - (stop - row)
    end = before + tl.minimum(BLOCK, stop - row)
    begin = first_seen(before + 1, WINDOW, CHUNK) // TILE * TILE
    return begin, end, tl.maximum((end - begin + TILE - 1) // TILE, 0)
