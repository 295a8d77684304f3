"""Paged attention for decoding: few rows, whose work is reading the cache.

The tiles of positions that all rows see are counted on the device and dealt evenly to as many programs as the card
holds at once: a long sequence beside short ones fills the card too, in a captured graph as well. A program may end in
the middle of a sequence; of programs that share one, the last to arrive weighs what all of them found, in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Launch, Tensors
from kernelmux_triton.attention_cache import LOG2E, Cached, pages_of, planes_of, pow2, wide_of
from kernelmux_triton.launch import bind

ROWS = 256
"""Rows at most: each program counts all of them."""
GROUP = 64
"""Query heads of one kv head at most, which one program takes together."""
COMPARED = 4096
"""Comparisons of a row with a sequence that a program makes at once, to find each row's own."""


@dataclass(frozen=True)
class Tuning:
    """How a program works: bytes of keys a step, steps whose loads are in flight, warps, programs a multiprocessor."""

    tile: int = 16384
    stages: int = 3
    warps: int = 4
    resident: int = 2


class Decode(Cached):
    """Sums in float32; the query heads of one kv head, and rows of one sequence, share what is read."""

    name = "decode"

    def __init__(self, cache_format: str, multiprocessors: int, tuning: Tuning = Tuning()) -> None:
        super().__init__(cache_format)
        self.multiprocessors, self.tuning = multiprocessors, tuning

    def workspace(self, node: TensorNode) -> int:
        # Of a program's first and last sequence the weighted values, the largest score and the sum of weights.
        # How wide the block table is nobody knows yet: room for all programs that the card holds at once.
        return 8 * self._most_programs * _tall(node) * (node.head_dim + 2)

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        q, k_cache, v_cache, query_start, kv_len, block_table = tensors.inputs
        (y,) = tensors.outputs
        assert tensors.workspace is not None
        (keys, k_scales), (values, v_scales) = planes_of(k_cache), planes_of(v_cache)
        m, dim, programs, tall = len(q), node.head_dim, self._programs(node), _tall(node)
        sizes = [2 * programs * tall * dim, 4 * programs * tall]
        found, weights = tensors.workspace.view(torch.float32)[: sum(sizes)].split(sizes)
        # Arrivals at each row and kv head: zeros before each launch, as the last to arrive leaves them.
        arrivals = torch.zeros(m * node.num_kv_heads, dtype=torch.int32, device=q.device)
        pack = pow2(node.num_heads // node.num_kv_heads)
        pieces = max(2, 8192 // (pack * wide_of(node)))
        return bind(
            _decode,
            (programs,),
            *(q, y, found, weights, arrivals, keys, k_scales, values, v_scales, query_start, kv_len, block_table),
            *(m, len(kv_len), block_table.stride(0)),
            *(node.scale, node.soft_cap or 0.0, node.window or 0),
            *(node.num_heads, node.num_kv_heads, dim, keys.shape[1], wide_of(node), pack, tall),
            *(self._tile(node), self.tuning.stages, pow2(m), max(16, COMPARED // pow2(m)), min(16, pieces)),
            *(self.scaled, self.splits_queries(node)),
            num_warps=self.tuning.warps if tall < 64 else 8,
        )

    @property
    def _most_programs(self) -> int:
        """As many as the card holds at once."""
        return self.multiprocessors * self.tuning.resident

    def _programs(self, node: TensorNode) -> int:
        """Those, or as many as there can be tiles."""
        m, width, page_size = node.inputs[0].extents[0], node.inputs[5].extents[1], node.inputs[1].extents[1]
        tiles = m * node.num_kv_heads * triton.cdiv(width * page_size, self._tile(node))
        return max(1, min(self._most_programs, tiles))

    def _tile(self, node: TensorNode) -> int:
        """Positions a step."""
        return min(128, max(16, self.tuning.tile // (wide_of(node) * self.itemsize)))


def _tall(node: TensorNode) -> int:
    """Rows of the tile of queries: the heads of one kv head, padded to a power of two, for one or more rows."""
    return max(16, pow2(node.num_heads // node.num_kv_heads))


@triton.jit(do_not_specialize=["rows", "sequences", "width"])
def _decode(
    q,
    y,
    found,
    weights,
    arrivals,
    k_cache,
    k_scales,
    v_cache,
    v_scales,
    query_start,
    kv_len,
    block_table,
    rows,
    sequences,
    width,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WIDE: tl.constexpr,
    PACK: tl.constexpr,
    TALL: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    PIECES: tl.constexpr,
    SCALED: tl.constexpr,
    LOW: tl.constexpr,
):
    """Attends for y [rows, HEADS * DIM]; each key and value of the cache is read once by each TALL / PACK rows.

    Work items, in order: blocks of up to TALL / PACK rows of one sequence, named by the first; their kv heads; the
    tiles of TILE positions that the block sees. Program i of n takes the i-th n-th of all tiles. Row r of the tile of
    queries is row r // PACK of the block and head r % PACK of the group. found [2 n, TALL, DIM] and weights [2 n, TALL,
    2] are what programs find of items that they share: first place for an item begun by another, second for one that
    another ends.
    """
    block: tl.constexpr = TALL // PACK
    group: tl.constexpr = HEADS // KV_HEADS
    program = tl.program_id(0)
    index = tl.arange(0, ROWS)
    owner = _owners(index, query_start, sequences, ROWS, SEQUENCES)
    known = (index < rows) & (owner < sequences) & (index >= tl.load(query_start))
    own = tl.minimum(owner, sequences - 1)
    end = tl.load(kv_len + own) - (tl.load(query_start + own + 1) - 1 - index)
    leads = (index - tl.load(query_start + own)) % block == 0
    tiles = _seen(index, own, query_start, kv_len, WINDOW, block, TILE)[2]
    units = tl.where(known & leads, tiles, 0).to(tl.int64) * KV_HEADS
    ends = tl.cumsum(units, axis=0)
    total_units = tl.sum(units, axis=0)

    for row in range(program, rows, tl.num_programs(0)):
        if tl.sum((index == row) & known & (end > 0), axis=0) == 0:
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
    member = tall % PACK
    while unit < stop_unit:
        row = tl.sum((ends <= unit).to(tl.int32), axis=0)
        here = index == row
        sequence = tl.sum(tl.where(here, own, 0), axis=0)
        row_first = tl.sum(tl.where(here, ends - units, 0), axis=0)
        begin, block_end, row_tiles = _seen(row, sequence, query_start, kv_len, WINDOW, block, TILE)
        within = (unit - row_first).to(tl.int32)
        kv_head, tile = within // row_tiles, within % row_tiles
        take = tl.minimum(row_tiles - tile, (stop_unit - unit).to(tl.int32))

        last_row = tl.minimum(tl.load(query_start + sequence + 1), row + block) - 1
        query_row = row + tall // PACK
        kept = (member < group) & (query_row <= last_row)
        sees = tl.where(kept, block_end - (last_row - query_row), block_end)
        head = query_row.to(tl.int64) * HEADS + kv_head * group + member
        inside = kept[:, None] & (column < DIM)[None, :]
        queries = tl.load(q + head[:, None] * DIM + column[None, :], mask=inside, other=0.0)

        peak = tl.full([TALL], float("-inf"), tl.float32)
        total = tl.zeros([TALL], tl.float32)
        sums = tl.zeros([TALL, WIDE], tl.float32)
        kind: tl.constexpr = tl.bfloat16 if SCALED else k_cache.dtype.element_ty
        high = queries.to(kind)
        low = (queries.to(tl.float32) - high.to(tl.float32)).to(kind)
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
            place = at[:, None] * DIM + column[None, :]
            there = valid[:, None] & (column < DIM)[None, :]
            keys = tl.trans(tl.load(k_cache + place, mask=there, other=0.0).to(kind))
            scores = tl.dot(high, keys, input_precision="ieee")
            if LOW:
                # What queries of another type have beyond the cache's.
                scores += tl.dot(low, keys, input_precision="ieee")
            if SCALED:
                scores *= tl.load(k_scales + at, mask=valid, other=0.0)[None, :]
            scores *= SCALE
            if CAP > 0:
                scores = CAP - 2 * CAP / (tl.exp(2 / CAP * scores) + 1)
            visible = position[None, :] < sees[:, None]
            if WINDOW > 0:
                visible = visible & (position[None, :] >= sees[:, None] - WINDOW)
            scores = tl.where(visible, scores * LOG2E, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, axis=1))
            # Finite where a row has seen nothing yet.
            level = tl.where(higher == float("-inf"), 0.0, higher)
            faded = tl.exp2(peak - level)
            each = tl.exp2(scores - level[:, None])
            values = tl.load(v_cache + place, mask=there, other=0.0).to(kind)
            total = total * faded + tl.sum(each, axis=1)
            if SCALED:
                each *= tl.load(v_scales + at, mask=valid, other=0.0)[None, :]
            sums = tl.dot(each.to(kind), values, sums * faded[:, None], input_precision="ieee")
            peak = higher

        if take == row_tiles:
            mixed = sums / tl.where(total > 0, total, 1.0)[:, None]
            tl.store(y + head[:, None] * DIM + column[None, :], mixed.to(y.dtype.element_ty), mask=inside)
        else:
            place = (2 * program + (tile == 0).to(tl.int32)) * TALL + tall
            tl.store(found + place[:, None] * DIM + column[None, :], sums, mask=inside)
            tl.store(weights + 2 * place, peak, mask=kept)
            tl.store(weights + 2 * place + 1, total, mask=kept)
            item_first = unit - tile
            opens = ((item_first + 1) * active - 1) // total_units
            closes = ((item_first + row_tiles) * active - 1) // total_units
            # Every thread has written before one of them says so.
            tl.debug_barrier()
            arrival = arrivals + row * KV_HEADS + kv_head
            if tl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu") == (closes - opens).to(tl.int32):
                tl.store(arrival, 0)
                first_head = row.to(tl.int64) * HEADS + kv_head * group
                for query in range(0, last_row - row + 1):
                    into = y + (first_head + query * HEADS) * DIM
                    pieces = opens.to(tl.int32), closes.to(tl.int32)
                    _weigh(found, weights, into, query * PACK, pieces, group, DIM, WIDE, PACK, TALL, PIECES)
        unit += take


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
def _seen(row, sequence, query_start, kv_len, WINDOW: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Of the block that a row leads, or each of several rows: its first tile's start, the end, the number of tiles."""
    stop = tl.load(query_start + sequence + 1)
    before = tl.load(kv_len + sequence) - (stop - row)
    end = before + tl.minimum(BLOCK, stop - row)
    begin = (tl.maximum(before + 1 - WINDOW, 0) // TILE) * TILE if WINDOW > 0 else row * 0
    return begin, end, tl.maximum((end - begin + TILE - 1) // TILE, 0)


@triton.jit
def _weigh(
    found,
    weights,
    y,
    tall,
    pieces,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    PACK: tl.constexpr,
    TALL: tl.constexpr,
    PIECES: tl.constexpr,
):
    """y [GROUP, DIM], one row's heads of one kv head, from what the first to the last of `pieces` found, in order."""
    opens, closes = pieces
    member, column = tl.arange(0, PACK), tl.arange(0, WIDE)
    peak = tl.full([PACK], float("-inf"), tl.float32)
    total = tl.zeros([PACK], tl.float32)
    mixed = tl.zeros([PACK, WIDE], tl.float32)
    for first in range(opens, closes + 1, PIECES):
        piece = first + tl.arange(0, PIECES)
        place = (2 * piece + (piece == opens).to(tl.int32)) * TALL + tall
        at = place[:, None] + member[None, :]
        there = (piece <= closes)[:, None] & (member < GROUP)[None, :]
        # Past the first-level cache, which knows nothing of other programs' stores.
        peaks = tl.load(weights + 2 * at, mask=there, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(weights + 2 * at + 1, mask=there, other=0.0, cache_modifier=".cg")
        inside = there[:, :, None] & (column < DIM)[None, None, :]
        sums = tl.load(
            found + at[:, :, None] * DIM + column[None, None, :], mask=inside, other=0.0, cache_modifier=".cg"
        )
        higher = tl.maximum(peak, tl.max(peaks, axis=0))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        share, faded = tl.exp2(peaks - level[None, :]), tl.exp2(peak - level)
        total = total * faded + tl.sum(totals * share, axis=0)
        mixed = mixed * faded[:, None] + tl.sum(sums * share[:, :, None], axis=0)
        peak = higher
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    kept = (member < GROUP)[:, None] & (column < DIM)[None, :]
    tl.store(y + member[:, None] * DIM + column[None, :], mixed.to(y.dtype.element_ty), mask=kept)
