"""The program of prefill.py: attention of a block of rows over paged tiles, masked where some row's sight ends."""

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
    q, y, k_cache, v_cache, k_scales, v_scales, sinks, query_start, kv_len, block_table, rows, sequences, width,
    SCALE: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, WIDE: tl.constexpr, PACK: tl.constexpr,
    TALL: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, SEQUENCES: tl.constexpr, SCALED: tl.constexpr, LOW: tl.constexpr,
    COPIES: tl.constexpr, ASSEMBLED: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Attends for y [rows, HEADS * DIM], TALL / PACK rows of one sequence and PACK heads a program.

    Grid: HEADS / PACK by blocks of rows, the last ones first, as they see most. A program reads the keys and values
    that its last row sees, 2 DIM elements a position. Row r of the tile of queries is row r // PACK of the block and
    head r % PACK. With COPIES the caches are descriptors of [positions, KV_HEADS * DIM] in boxes of [TILE, DIM].
    """
    block: tl.constexpr = TALL // PACK
    kind: tl.constexpr = tl.bfloat16 if SCALED else (k_cache.dtype if COPIES else k_cache.dtype.element_ty)
    turn = tl.num_programs(1) - 1 - tl.program_id(1)
    row, stop, length, sequence = _block(turn, query_start, kv_len, rows, sequences, block, SEQUENCES)
    first_head = tl.program_id(0) * PACK
    kv_head = first_head // (HEADS // KV_HEADS)
    last_row = tl.minimum(row + block, stop) - 1
    query_row, kept, at, inside = _places(row, stop, first_head, HEADS, DIM, WIDE, PACK, TALL)
    # Where the sight of the first row ends, of the last, and of each; rows of no one see as much as the last.
    first_end = tl.maximum(length - (stop - 1 - row), 0)
    block_end = tl.maximum(length - (stop - 1 - last_row), 0)
    sees = tl.where(kept, length - (stop - 1 - query_row), block_end)
    loaded = tl.load(q + at, mask=inside, other=0.0)
    queries = split_queries(loaded, kind, SCALED)

    # Tiles from `begin`: up to `low_edge` some row's window or chunk begins later, from `whole` on one's sight ends.
    table = block_table + sequence.to(tl.int64) * width
    tiles, whole = tl.cdiv(block_end, TILE), first_end // TILE
    begin, low_edge = 0, 0
    if WINDOW > 0 or CHUNK > 0:
        begin = first_seen(first_end, WINDOW, CHUNK) // TILE
        low_edge = tl.minimum(tl.cdiv(first_seen(block_end, WINDOW, CHUNK), TILE), tiles)
    state = nothing_seen(TALL, WIDE, SCALED)
    caches = k_cache, v_cache, k_scales, v_scales
    if WINDOW > 0 or CHUNK > 0:
        state = _tiles(
            begin, low_edge, queries, sees, state, caches, table, kv_head, block_end, SCALE, CAP, WINDOW, CHUNK,
            KV_HEADS, DIM, PAGE, WIDE, TILE, STAGES, SCALED, LOW, COPIES, ASSEMBLED, True,
        )  # fmt: skip
    first_whole, first_edge = tl.maximum(begin, low_edge), tl.maximum(whole, low_edge)
    state = _tiles(
        first_whole, whole, queries, sees, state, caches, table, kv_head, block_end, SCALE, CAP, WINDOW, CHUNK,
        KV_HEADS, DIM, PAGE, WIDE, TILE, STAGES, SCALED, LOW, COPIES, ASSEMBLED, False,
    )  # fmt: skip
    state = _tiles(
        first_edge, tiles, queries, sees, state, caches, table, kv_head, block_end, SCALE, CAP, WINDOW, CHUNK,
        KV_HEADS, DIM, PAGE, WIDE, TILE, STAGES, SCALED, LOW, COPIES, ASSEMBLED, True,
    )  # fmt: skip
    peak, total, sums, odd_sums = state
    total = with_sink(peak, total, sinks, first_head + tl.arange(0, TALL) % PACK, kept, SINKS)
    mixed = joined(sums, odd_sums, SCALED) * (1 / tl.where(total > 0, total, 1.0))[:, None]
    # Looked up again: what is needed before the loops and after them would be in registers meanwhile.
    row, stop, length, sequence = _block(turn, query_start, kv_len, rows, sequences, block, SEQUENCES)
    query_row, kept, at, inside = _places(row, stop, first_head, HEADS, DIM, WIDE, PACK, TALL)
    tl.store(y + at, mixed.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _places(
    row, stop, first_head, HEADS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, PACK: tl.constexpr,
    TALL: tl.constexpr,
):  # fmt: skip
    """Of a tile of queries the rows and whether they are there [TALL]; their elements' places and whether [TALL, WIDE].

    It begins at `row`, of a sequence whose rows end at `stop`.
    """
    tall, column = tl.arange(0, TALL), tl.arange(0, WIDE)
    query_row = row + tall // PACK
    kept = query_row < tl.minimum(row + TALL // PACK, stop)
    at = (query_row.to(tl.int64) * HEADS + first_head + tall % PACK)[:, None] * DIM + column[None, :]
    return query_row, kept, at, kept[:, None] & (column < DIM)[None, :]


@triton.jit
def _block(turn, query_start, kv_len, rows, sequences, BLOCK: tl.constexpr, SEQUENCES: tl.constexpr):
    """A block's first row, the end of its sequence's rows, and that sequence's length and number.

    The rows before the first sequence, and those after the last, count as sequences of length 0. Past the last block
    the first row is `rows`, which ends there: nothing is read or written.
    """
    before, blocks, ends = 0, 0, 0
    for start in range(0, sequences + 2, SEQUENCES):
        index = start + tl.arange(0, SEQUENCES)
        first = tl.load(query_start + index - 1, mask=(index > 0) & (index < sequences + 2), other=0)
        stop = tl.load(query_start + index, mask=index <= sequences, other=rows)
        count = tl.where(index < sequences + 2, (tl.maximum(stop - first, 0) + BLOCK - 1) // BLOCK, 0)
        ended = (index < sequences + 2) & (ends + tl.cumsum(count, axis=0) <= turn)
        before += tl.sum(ended.to(tl.int32), axis=0)
        blocks += tl.sum(tl.where(ended, count, 0), axis=0)
        ends += tl.sum(count, axis=0)
    first = tl.load(query_start + before - 1, mask=(before > 0) & (before < sequences + 2), other=0)
    stop = tl.load(query_start + before, mask=before <= sequences, other=rows)
    owned = (before > 0) & (before <= sequences)
    sequence = tl.minimum(tl.maximum(before - 1, 0), sequences - 1)
    length = tl.load(kv_len + sequence, mask=owned, other=0)
    row = tl.where(before < sequences + 2, first + (turn - blocks) * BLOCK, rows)
    stop = tl.where(before < sequences + 2, stop, rows)
    return row, stop, length, sequence


@triton.jit
def _tiles(
    first_tile, stop_tile, queries, sees, state, caches, table, kv_head, end,
    SCALE: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, KV_HEADS: tl.constexpr,
    DIM: tl.constexpr, PAGE: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    SCALED: tl.constexpr, LOW: tl.constexpr, COPIES: tl.constexpr, ASSEMBLED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Some tiles more: the largest scores, the sums of weights and the weighted values [TALL, WIDE] with them.

    Unless MASKED every row sees all of them. The largest scores are times log2(e), scaled and capped. Where SCALED,
    queries and values are even and odd columns [TALL, WIDE / 2] apart.
    """
    peak, total, sums, odd_sums = state
    k_cache, v_cache, k_scales, v_scales = caches
    # The scale of a score comes with the exponent, unless a cap stands between.
    late: tl.constexpr = CAP == 0 and SCALE > 0 and not SCALED
    factor: tl.constexpr = SCALE * LOG2E if late else 1.0
    # Numbers of a head as they are loaded.
    held: tl.constexpr = DIM // 2 if SCALED else DIM
    wide: tl.constexpr = WIDE // 2 if SCALED else WIDE
    pages = pages_of(table, first_tile * TILE, end, PAGE, TILE)
    for tile in tl.range(first_tile, stop_tile, num_stages=STAGES):
        start = tile * TILE
        position = start + tl.arange(0, TILE)
        valid = position < end
        slot = pages.to(tl.int64) * PAGE + position % PAGE
        corner = pages * PAGE + start % PAGE
        at = slot * KV_HEADS + kv_head
        place = at[:, None] * held + tl.arange(0, wide)[None, :]
        # Ahead of the loads that need them.
        pages = pages_of(table, start + TILE, end, PAGE, TILE)
        keys = _load(k_cache, place, corner, kv_head * DIM, valid, held, wide, COPIES, MASKED)
        scores = score(queries, keys, k_scales, at, valid, SCALED, LOW, ASSEMBLED)
        if not late:
            scores = capped(scores, SCALE, CAP) * LOG2E
        if MASKED:
            visible = position[None, :] < sees[:, None]
            if WINDOW > 0 or CHUNK > 0:
                visible = visible & (position[None, :] >= first_seen(sees, WINDOW, CHUNK)[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        peak, faded, each = fade(peak, scores, factor, MASKED)
        values = _load(v_cache, place, corner, kv_head * DIM, valid, held, wide, COPIES, MASKED)
        if COPIES and MASKED:
            # Memory that no sequence has written may hold NaN.
            values = tl.where(valid[:, None], values, 0.0)
        total = total * faded + tl.sum(each, axis=1)
        sums, odd_sums = add_values(sums, odd_sums, faded, each, values, v_scales, at, valid, SCALED, ASSEMBLED)
    return peak, total, sums, odd_sums


@triton.jit
def _load(
    cache, place, corner, first_column, valid,
    HELD: tl.constexpr, WIDE: tl.constexpr, COPIES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile [TILE, WIDE] of a cache: a box from `corner`, or elements by `place` with no more masks than needed."""
    column = tl.arange(0, WIDE)
    if COPIES:
        tile = cache.load([corner, first_column])
    elif MASKED:
        tile = tl.load(cache + place, mask=valid[:, None] & (column < HELD)[None, :], other=0)
    elif HELD < WIDE:
        tile = tl.load(cache + place, mask=(column < HELD)[None, :], other=0)
    else:
        tile = tl.load(cache + place)
    return tile
