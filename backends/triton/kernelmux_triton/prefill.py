"""Paged attention for prompts: many rows of a sequence against the same keys; any mixture of sequences in one call.

Rows come in blocks of one sequence, the query heads of one kv head packed beside each other, so that only the tiles
of positions where some row's sight ends are masked. Softmax as FlashAttention-2 has it (Dao 2023, arXiv:2307.08691).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Launch, Tensors
from kernelmux_triton.attention_cache import LOG2E, Cached, pages_of, planes_of, pow2, wide_of
from kernelmux_triton.launch import bind

SEQUENCES = 64
"""Sequences that are looked through at once for a program's block."""


@dataclass(frozen=True)
class Tuning:
    """How a program works: rows and bytes of keys a tile, tiles in flight, warps; `copies`: TMA loads the tiles.

    It takes pages of whole tiles, whose elements are as wide as the matrix units read them, and heads without gaps.
    """

    tall: int = 128
    tile: int = 16384
    stages: int = 2
    warps: int = 4
    copies: bool = True

    def columns(self, wide: int) -> int:
        """Positions of a tile of two-byte keys."""
        return max(16, min(128, self.tile // (2 * wide)))


# Addresses of a tile's rows are in registers that more queries would need.
GATHERING = Tuning(tall=64, copies=False)
SMALL = Tuning(tall=64, tile=8192, copies=False)
"""For cards with less than 160 KB of shared memory a multiprocessor."""


def tunings_for(capability: tuple[int, int] | None) -> Sequence[Tuning]:
    """What suits a card, the better first: A100, H100 and B200 have room for large tiles, their relatives have not."""
    if capability is None or capability in ((9, 0), (10, 0), (10, 3)):
        return Tuning(), GATHERING
    return [GATHERING if capability == (8, 0) else SMALL]


class Prefill(Cached):
    """Sums in float32; a tile of keys and values is read once by each 128 queries."""

    name = "prefill"

    def __init__(self, cache_format: str, tunings: Sequence[Tuning] = tunings_for(None)) -> None:
        super().__init__(cache_format)
        self.tunings = tunings
        """Those to choose from: the first that takes a node's pages."""

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        q, k_cache, v_cache, query_start, kv_len, block_table = tensors.inputs
        (y,) = tensors.outputs
        (keys, k_scales), (values, v_scales) = planes_of(k_cache), planes_of(v_cache)
        m, seqs, dim, heads = len(q), len(kv_len), node.head_dim, node.num_heads
        tuning, wide, pack = self.tuning(node), wide_of(node), _pack(node)
        tall, tile = self._tall(node, tuning), self._tile(node, tuning)
        read: list[Any] = [keys, values]
        if tuning.copies:
            flat = [cache.view(-1, node.num_kv_heads * dim) for cache in (keys, values)]
            read = [TensorDescriptor.from_tensor(cache, [tile, dim]) for cache in flat]
        # Each sequence, and the rows of none at either end, may begin a block.
        blocks = m // (tall // pack) + min(m, seqs + 2)
        return bind(
            _prefill,
            (heads // pack, blocks),
            *(q, y, *read, k_scales, v_scales, query_start, kv_len, block_table, m, seqs, block_table.stride(0)),
            *(node.scale, node.soft_cap or 0.0, node.window or 0),
            *(heads, node.num_kv_heads, dim, keys.shape[1], wide, pack, tall, tile, tuning.stages),
            *(SEQUENCES, self.scaled, self.splits_queries(node), tuning.copies),
            num_warps=tuning.warps,
        )

    def tuning(self, node: TensorNode) -> Tuning:
        """The one that is chosen for a node."""
        wide, page_size = wide_of(node), node.inputs[1].extents[1]
        copied = self.itemsize == 2 and node.head_dim == wide
        return next(t for t in self.tunings if not t.copies or (copied and page_size % t.columns(wide) == 0))

    def _tall(self, node: TensorNode, tuning: Tuning) -> int:
        """Rows of the tile of queries: no more than there are, and than a warp has registers for."""
        wide = wide_of(node)
        limit = min(tuning.tall, 4096 * tuning.warps // wide)
        if self.itemsize == 4:
            limit = min(32, 4096 // wide)
        return max(16, _pack(node), min(limit, pow2(node.inputs[0].extents[0] * _pack(node))))

    def _tile(self, node: TensorNode, tuning: Tuning) -> int:
        """Positions a tile; products of float32, which no matrix unit makes, are kept small."""
        wide = wide_of(node)
        return max(16, min(32, 4096 // wide)) if self.itemsize == 4 else tuning.columns(wide)


def _pack(node: TensorNode) -> int:
    """Query heads of a kv head that lie in one tile: the largest power of two that leaves none over."""
    group = node.num_heads // node.num_kv_heads
    return min(64, group & -group)


@triton.jit(do_not_specialize=["rows", "sequences", "width"])
def _prefill(
    q,
    y,
    k_cache,
    v_cache,
    k_scales,
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
    SEQUENCES: tl.constexpr,
    SCALED: tl.constexpr,
    LOW: tl.constexpr,
    COPIES: tl.constexpr,
):
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
    queries = tl.load(q + at, mask=inside, other=0.0)
    high = queries.to(kind)
    low = (queries.to(tl.float32) - high.to(tl.float32)).to(kind) if LOW else high

    # Tiles from `begin`: up to `low_edge` some row's window begins later, from `whole` on some row's sight ends.
    table = block_table + sequence.to(tl.int64) * width
    tiles, whole = tl.cdiv(block_end, TILE), first_end // TILE
    begin, low_edge = 0, 0
    if WINDOW > 0:
        begin = tl.maximum(first_end - WINDOW, 0) // TILE
        low_edge = tl.minimum(tl.cdiv(tl.maximum(block_end - WINDOW, 0), TILE), tiles)
    peak = tl.full([TALL], float("-inf"), tl.float32)
    total = tl.zeros([TALL], tl.float32)
    sums = tl.zeros([TALL, WIDE], tl.float32)
    if WINDOW > 0:
        peak, total, sums = _attend(
            begin, low_edge, high, low, sees, peak, total, sums, k_cache, v_cache, k_scales, v_scales, table,
            kv_head, block_end, SCALE, CAP, WINDOW, KV_HEADS, DIM, PAGE, WIDE, TILE, STAGES, SCALED, LOW, COPIES, True,
        )  # fmt: skip
    first_whole, first_edge = tl.maximum(begin, low_edge), tl.maximum(whole, low_edge)
    peak, total, sums = _attend(
        first_whole, whole, high, low, sees, peak, total, sums, k_cache, v_cache, k_scales, v_scales, table,
        kv_head, block_end, SCALE, CAP, WINDOW, KV_HEADS, DIM, PAGE, WIDE, TILE, STAGES, SCALED, LOW, COPIES, False,
    )  # fmt: skip
    peak, total, sums = _attend(
        first_edge, tiles, high, low, sees, peak, total, sums, k_cache, v_cache, k_scales, v_scales, table,
        kv_head, block_end, SCALE, CAP, WINDOW, KV_HEADS, DIM, PAGE, WIDE, TILE, STAGES, SCALED, LOW, COPIES, True,
    )  # fmt: skip
    mixed = sums * (1 / tl.where(total > 0, total, 1.0))[:, None]
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
def _attend(
    first_tile,
    stop_tile,
    high,
    low,
    sees,
    peak,
    total,
    sums,
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    table,
    kv_head,
    end,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    LOW: tl.constexpr,
    COPIES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Some tiles more: the largest scores, the sums of weights and the weighted values [TALL, WIDE] with them.

    Unless MASKED every row sees all of them. `peak` is of scores times log2(e), scaled and capped.
    """
    # The scale of a score comes with the exponent, unless a cap stands between.
    late: tl.constexpr = CAP == 0 and SCALE > 0 and not SCALED
    factor: tl.constexpr = SCALE * LOG2E if late else 1.0
    column = tl.arange(0, WIDE)
    pages = pages_of(table, first_tile * TILE, end, PAGE, TILE)
    for tile in tl.range(first_tile, stop_tile, num_stages=STAGES):
        start = tile * TILE
        position = start + tl.arange(0, TILE)
        valid = position < end
        slot = pages.to(tl.int64) * PAGE + position % PAGE
        corner = pages * PAGE + start % PAGE
        at = slot * KV_HEADS + kv_head
        place = at[:, None] * DIM + column[None, :]
        # Ahead of the loads that need them.
        pages = pages_of(table, start + TILE, end, PAGE, TILE)
        keys = _load(k_cache, place, corner, kv_head * DIM, valid, DIM, WIDE, COPIES, MASKED).to(high.dtype)
        scores = tl.dot(high, tl.trans(keys), input_precision="ieee")
        if LOW:
            # What queries of another type have beyond the cache's.
            scores += tl.dot(low, tl.trans(keys), input_precision="ieee")
        if SCALED:
            scores *= tl.load(k_scales + at, mask=valid, other=0.0)[None, :]
        if not late:
            scores *= SCALE
            if CAP > 0:
                scores = CAP - 2 * CAP / (tl.exp(2 / CAP * scores) + 1)
            scores *= LOG2E
        if MASKED:
            visible = position[None, :] < sees[:, None]
            if WINDOW > 0:
                visible = visible & (position[None, :] >= sees[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1) * factor)
        # Finite where a row has seen nothing yet.
        level = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        faded = tl.exp2(peak - level)
        each = tl.exp2(scores * factor - level[:, None])
        values = _load(v_cache, place, corner, kv_head * DIM, valid, DIM, WIDE, COPIES, MASKED).to(high.dtype)
        if COPIES and MASKED:
            # Memory that no sequence has written may hold NaN.
            values = tl.where(valid[:, None], values, 0.0)
        total = total * faded + tl.sum(each, axis=1)
        if SCALED:
            each *= tl.load(v_scales + at, mask=valid, other=0.0)[None, :]
        sums = tl.dot(each.to(high.dtype), values, sums * faded[:, None], input_precision="ieee")
        peak = higher
    return peak, total, sums


@triton.jit
def _load(
    cache,
    place,
    corner,
    first_column,
    valid,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    COPIES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile [TILE, WIDE] of a cache: a box from `corner`, or elements by `place` with no more masks than needed."""
    column = tl.arange(0, WIDE)
    if COPIES:
        tile = cache.load([corner, first_column])
    elif MASKED:
        tile = tl.load(cache + place, mask=valid[:, None] & (column < DIM)[None, :], other=0.0)
    elif DIM < WIDE:
        tile = tl.load(cache + place, mask=(column < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(cache + place)
    return tile
