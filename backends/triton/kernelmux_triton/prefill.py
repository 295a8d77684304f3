"""Paged attention for prompts: many rows of a sequence against the same keys; any mixture of sequences in one call.

Rows come in blocks of one sequence, the query heads of one kv head packed beside each other, so that only the tiles
of positions where some row's sight ends are masked. Softmax as FlashAttention-2 has it (Dao 2023, arXiv:2307.08691).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from triton.tools.tensor_descriptor import TensorDescriptor

from kernelmux.contract import Efficiency, Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_triton.attention_cache import Cached, itemsize, pow2, scaled, splits_queries, wide_of
from kernelmux_triton.launch import bind
from kernelmux_triton.prefill_kernels import attend

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
    efficiency = Efficiency(reading=0.5, multiplying=0.4, arithmetic="bf16")

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        q, _, _, query_start, kv_len, block_table = tensors.inputs
        (y,), (keys, k_scales, values, v_scales) = tensors.outputs, self.caches(node, tensors)
        m, seqs, dim, heads = len(q), len(kv_len), node.head_dim, node.num_heads
        tuning, wide, pack = self.tuning(node), wide_of(node), _pack(node)
        sinks, sunk = self.sinks(node, tensors)
        tall, tile = self._tall(node, tuning), self._tile(node, tuning)
        read: list[Any] = [keys, values]
        if tuning.copies:
            flat = [cache.view(-1, node.num_kv_heads * dim) for cache in (keys, values)]
            read = [TensorDescriptor.from_tensor(cache, [tile, dim]) for cache in flat]
        # Each sequence, and the rows of none at either end, may begin a block.
        blocks = m // (tall // pack) + min(m, seqs + 2)
        return bind(
            attend,
            (heads // pack, blocks),
            *(q, y, *read, k_scales, v_scales, sinks),
            *(query_start, kv_len, block_table, m, seqs, block_table.stride(0)),
            *(node.scale, node.soft_cap or 0.0, node.window, node.chunk),
            *(heads, node.num_kv_heads, dim, keys.shape[1], wide, pack, tall, tile, tuning.stages),
            *(SEQUENCES, scaled(node), splits_queries(node), tuning.copies, not q.is_cpu, sunk),
            stream=stream,
            num_warps=tuning.warps,
        )

    def tuning(self, node: TensorNode) -> Tuning:
        """The first of the card's that takes a node's pages, unless a measurement tries another."""
        wide, page_size = wide_of(node), node.inputs[1].extents[1]
        copied = itemsize(node) == 2 and node.head_dim == wide
        tunings = [self.variant] if self.variant else tunings_for(self.device.capability)
        return next(t for t in tunings if not t.copies or (copied and page_size % t.columns(wide) == 0))

    def _tall(self, node: TensorNode, tuning: Tuning) -> int:
        """Rows of the tile of queries: no more than there are, and than a warp has registers for."""
        wide = wide_of(node)
        limit = min(tuning.tall, 4096 * tuning.warps // wide)
        if itemsize(node) == 4:
            limit = min(32, 4096 // wide)
        return max(16, _pack(node), min(limit, pow2(node.inputs[0].extents[0] * _pack(node))))

    def _tile(self, node: TensorNode, tuning: Tuning) -> int:
        """Positions a tile; products of float32, which no matrix unit makes, are kept small."""
        wide = wide_of(node)
        return max(16, min(32, 4096 // wide)) if itemsize(node) == 4 else tuning.columns(wide)


class PrefillF32(Prefill):
    """Products in float32."""

    precision = 1e-9
    takes = {**Prefill.takes, "cache_format": ("f32",)}


def _pack(node: TensorNode) -> int:
    """Query heads of a kv head that lie in one tile: the largest power of two that leaves none over."""
    group = node.num_heads // node.num_kv_heads
    return min(64, group & -group)
