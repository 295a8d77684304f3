"""attention through torch's scaled_dot_product_attention, one call a sequence, over pages gathered where they lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from kernelmux.contract import Declined, Efficiency, Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux.graph.ops.attention import visible
from kernelmux_torch.kernel import FLOATS, TorchKernel


class Sdpa(TorchKernel):
    """The query heads that share a kv head are one head's rows to torch, so that keys are never repeated in memory."""

    ops = ("attention",)
    name = "sdpa"
    precision = 1e-9
    # A launch reads lengths and pages on the host, and allocates.
    capturable = False
    devices: tuple[str, ...] = ("cpu",)
    takes: Mapping[str, object] = {"cache_format": FLOATS}
    packed = "f32"
    # One thread at 512 cached tokens: 3.5 GB/s of a step that decodes, 39 GFLOP/s of a prompt.
    efficiency = Efficiency(reading=0.3, multiplying=0.25)

    def refuses(self, node: TensorNode) -> Declined | None:
        return Declined("torch's attention has no soft cap", "unsupported") if node.soft_cap else None

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        # torch wants queries in the type of keys and values.
        return [[node.inputs[1].format], *([value.format] for value in node.inputs[1:])]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [[node.inputs[1].format]]

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        q, k_cache, v_cache, query_start, kv_len, block_table = tensors.inputs
        (y,) = tensors.outputs
        group, page_size = node.num_heads // node.num_kv_heads, k_cache.shape[1]
        # [kv heads, m, group, dim]: query head h reads kv head h // group.
        queries, results = (t.view(len(t), node.num_kv_heads, group, node.head_dim).transpose(0, 1) for t in (q, y))
        # [kv heads, slots, dim]
        keys, values = (cache.flatten(0, 1).transpose(0, 1) for cache in (k_cache, v_cache))
        sinks = tensors.packed[0].view(-1, 1, group) if node.weight else None

        def launch() -> None:
            starts = query_start.tolist()
            for seq, length in enumerate(kv_len.tolist()):
                rows = slice(starts[seq], starts[seq + 1])
                if length == 0:
                    results[:, rows].zero_()
                elif rows.start < rows.stop:
                    slots = _slots(block_table[seq, : -(-length // page_size)], page_size, length)
                    results[:, rows] = _one_sequence(node, queries[:, rows], keys[:, slots], values[:, slots], sinks)
            if starts[-1] < len(y):
                y[starts[-1] :].zero_()

        return launch


def _slots(pages: torch.Tensor, page_size: int, length: int) -> slice | torch.Tensor:
    """A sequence's rows: a slice, which copies nothing, where its pages are neighbours, else indices."""
    order = pages.tolist()
    first = order[0]
    if order == list(range(first, first + len(order))):
        return slice(first * page_size, first * page_size + length)
    return (pages.unsqueeze(1) * page_size + torch.arange(page_size)).flatten()[:length]


def _one_sequence(
    node: TensorNode, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    """q [kv heads, rows, group, dim] against keys and values [kv heads, length, dim]; the shape of q.

    sinks [kv heads, 1, group] take their share of each softmax.
    """
    _, rows, group, _ = q.shape
    mask = None
    if rows > 1 or node.window or node.chunk:
        mask = visible(rows, keys.shape[1], node.window, q.device, node.chunk).repeat_interleave(group, dim=0)
    heads = [part.unsqueeze(0) for part in (q.flatten(1, 2), keys, values)]
    if sinks is None:
        return scaled_dot_product_attention(*heads, attn_mask=mask, scale=node.scale).view(q.shape)
    added = None if mask is None else torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)
    # What the call above makes of it, and the logarithm of the sum that the sink is added to. In float32: of a narrower
    # type the result would be rounded before the sinks have their share, and once more after.
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mixed, summed = attend(*(part.float() for part in heads), attn_mask=added, scale=node.scale)
    return mixed.view(q.shape) * torch.sigmoid(summed.view(q.shape[:3]) - sinks).unsqueeze(-1)
