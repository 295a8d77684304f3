"""Paged attention for decoding: few rows, whose work is reading the cache.

The tiles of positions that all rows see are counted on the device and dealt evenly to as many programs as the card
holds at once: a long sequence beside short ones fills the card too, in a captured graph as well. A program may end in
the middle of a sequence; a second launch weighs what those that share one have found, in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton

from kernelmux.contract import Declined, Efficiency, Launch, Tensors, in_turn
from kernelmux.graph.graph import TensorNode
from kernelmux_triton.attention_cache import Cached, itemsize, pow2, scaled, splits_queries, wide_of
from kernelmux_triton.decode_kernels import attend, weigh
from kernelmux_triton.launch import bind

FEW = 64
"""Rows up to which reading the cache is most of the work: more are for prefill."""
ROWS = 256
"""Rows at most: each program counts all of them."""
GROUP = 64
"""Query heads of one kv head at most, which one program takes together."""
PIECES = 32
"""Programs at most of whose findings a weighing one reads at once."""
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
    efficiency = Efficiency(reading=0.5, multiplying=0.1, arithmetic="bf16")
    launches = 2
    takes: Mapping[str, object] = {**Cached.takes, "m": f"..{ROWS}"}

    @property
    def tuning(self) -> Tuning:
        """How it works: as for this card, unless a measurement tries another."""
        return self.variant or Tuning()

    def refuses(self, node: TensorNode) -> Declined | None:
        if (group := node.num_heads // node.num_kv_heads) > GROUP:
            reason = f"one program takes a kv head's queries: up to {GROUP} heads, not {group}; prefill takes any"
            return Declined(reason, "shape")
        return super().refuses(node)

    def comes_late(self, node: TensorNode) -> bool:
        return node.rows > FEW

    def workspace(self, node: TensorNode) -> int:
        # How wide the block table is nobody knows yet: room for all programs that the card holds at once.
        return 4 * sum(_sizes(node, self._most_programs))

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        q, _, _, query_start, kv_len, block_table = tensors.inputs
        (y,), caches = tensors.outputs, self.caches(node, tensors)
        assert tensors.workspace is not None
        m, seqs, programs, tall = len(q), len(kv_len), self._programs(node), _tall(node)
        sizes = _sizes(node, programs)
        found, weights, spans = tensors.workspace.view(torch.float32)[: sum(sizes)].split(sizes)
        spans = spans.view(torch.int32)
        sinks, sunk = self.sinks(node, tensors)
        heads = (node.num_heads, node.num_kv_heads, node.head_dim)
        pack, rows = pow2(node.num_heads // node.num_kv_heads), pow2(m)
        attends = bind(
            attend,
            (programs,),
            *(q, y, found, weights, spans, *caches, sinks, query_start, kv_len, block_table),
            *(m, seqs, block_table.stride(0)),
            *(node.scale, node.soft_cap or 0.0, node.window, node.chunk),
            *(*heads, caches[0].shape[1], wide_of(node), pack, tall),
            *(self._tile(node), self.tuning.stages, rows, max(16, min(pow2(seqs), COMPARED // rows))),
            *(scaled(node), splits_queries(node), not q.is_cpu, sunk),
            stream=stream,
            num_warps=self.tuning.warps if tall < 64 else 8,
        )
        weighs = bind(
            weigh,
            (m, node.num_heads),
            *(y, found, weights, spans, sinks, *heads, wide_of(node), tall, PIECES, sunk),
            stream=stream,
            num_warps=2,
        )
        return in_turn(attends, weighs)

    @property
    def _most_programs(self) -> int:
        """As many as the card holds at once."""
        return self.device.processors * self.tuning.resident

    def _programs(self, node: TensorNode) -> int:
        """Those, or as many as there can be tiles."""
        m, width, page_size = node.inputs[0].extents[0], node.inputs[5].extents[1], node.inputs[1].extents[1]
        tiles = m * node.num_kv_heads * triton.cdiv(width * page_size, self._tile(node))
        return max(1, min(self._most_programs, tiles))

    def _tile(self, node: TensorNode) -> int:
        """Positions a step."""
        return min(128, max(16, self.tuning.tile // (wide_of(node) * itemsize(node))))


class DecodeF32(Decode):
    """Products in float32."""

    precision = 1e-9
    takes = {**Decode.takes, "cache_format": ("f32",)}


def _tall(node: TensorNode) -> int:
    """Rows of the tile of queries: the heads of one kv head, padded to a power of two, for one or more rows."""
    return max(16, pow2(node.num_heads // node.num_kv_heads))


def _sizes(node: TensorNode, programs: int) -> list[int]:
    """Numbers of scratch: of each program's first and last item the values, the largest score and the sum of weights.

    Then of each row and kv head which programs share it, and its place among the rows that one takes.
    """
    items = 2 * programs * _tall(node)
    return [items * node.head_dim, 2 * items, 3 * node.inputs[0].extents[0] * node.num_kv_heads]
