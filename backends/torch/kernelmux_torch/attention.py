"""attention through torch's scaled_dot_product_attention, one call a sequence, over pages gathered where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Answer, Declined, Kernel, Launch, Tensors
from kernelmux.ops.attention import visible


def offer(node: TensorNode) -> Answer:
    if node.soft_cap:
        return Declined("torch's attention has no soft cap", "unsupported", "sdpa")
    return Sdpa()


class Sdpa(Kernel):
    """The query heads that share a kv head are one head's rows to torch, so that keys are never repeated in memory."""

    name = "sdpa"
    precision = 1e-9
    # A launch reads lengths and pages on the host, and allocates.
    capturable = False

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [[value.format] for value in node.inputs]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        q, k_cache, v_cache, query_start, kv_len, block_table = tensors.inputs
        (y,) = tensors.outputs
        group = node.num_heads // node.num_kv_heads
        # [m, kv heads, group, dim]: head h reads kv head h // group.
        queries, results = (t.view(t.shape[0], node.num_kv_heads, group, node.head_dim) for t in (q, y))

        def launch() -> None:
            starts = query_start.tolist()
            for seq, length in enumerate(kv_len.tolist()):
                first, end = starts[seq], starts[seq + 1]
                if first == end:
                    continue
                if length == 0:
                    results[first:end].zero_()
                    continue
                pages = block_table[seq]
                keys, values = (_gather(cache, pages, length) for cache in (k_cache, v_cache))
                results[first:end] = _one_sequence(node, queries[first:end], keys, values)
            if starts[-1] < len(y):
                y[starts[-1] :].zero_()

        return launch


def _gather(cache: torch.Tensor, pages: torch.Tensor, length: int) -> torch.Tensor:
    """A sequence's rows as [kv heads, length, dim]: a view where its pages are neighbours."""
    page_size = cache.shape[1]
    order = pages[: -(-length // page_size)].tolist()
    first, count = order[0], len(order)
    neighbours = order == list(range(first, first + count))
    rows = cache[first : first + count] if neighbours else cache[pages[:count]]
    return rows.flatten(0, 1)[:length].transpose(0, 1)


def _one_sequence(node: TensorNode, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """q [rows, kv heads, group, dim] against keys and values [kv heads, length, dim]; the shape of q."""
    rows, kv_heads, group, dim = q.shape
    length = keys.shape[1]
    mask = None
    if rows > 1 or node.window:
        mask = visible(rows, length, node.window, q.device).repeat_interleave(group, dim=0)
    stacked = q.transpose(0, 1).reshape(1, kv_heads, rows * group, dim)
    mixed = scaled_dot_product_attention(stacked, keys[None], values[None], attn_mask=mask, scale=node.scale)
    return mixed.view(kv_heads, rows, group, dim).transpose(0, 1)
