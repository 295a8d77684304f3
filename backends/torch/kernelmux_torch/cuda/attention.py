"""attention on CUDA: torch's scaled_dot_product_attention, one call a sequence; of few rows what a graph can hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernelmux.contract import Declined, Efficiency, Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux.graph.ops.attention import sees, visible
from kernelmux_torch import attention
from kernelmux_torch.kernel import FLOATS, TorchKernel

FASTEST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
GATHERED = 2**28
"""Numbers of keys that are gathered at once at most, and as many of values: a gigabyte each in float32."""


class Sdpa(attention.Sdpa):
    """cuDNN's attention, or the next best that takes the shapes; lengths and pages come from the host's mirror."""

    devices = ("cuda",)
    efficiency = Efficiency(reading=0.3, multiplying=0.4, arithmetic="bf16")
    takes = {"cache_format": ("f32",)}

    def refuses(self, node: TensorNode) -> Declined | None:
        if node.chunk:
            return Declined("it reads no chunks apart", "unsupported")
        return Declined("torch's attention has no sinks", "unsupported") if node.weight else super().refuses(node)

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        # torch allocates its result, so that it is copied in any case: into any format at one cost.
        return [[node.inputs[1].format, *(f for f in ("f32", "bf16", "f16") if f != node.inputs[1].format)]]

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        q, k_cache, v_cache, _, _, block_table = tensors.inputs
        (y,) = tensors.outputs
        page_size, mix = k_cache.shape[1], _attends(node, q)
        # [1, heads, m, dim]
        queries, results = (t.view(1, len(t), node.num_heads, -1).transpose(1, 2) for t in (q, y))
        # Without mirrors, the device's own numbers: a launch waits for them.
        mirrors = zip(tensors.host or tensors.inputs, tensors.inputs, strict=True)
        starts_of, lengths_of, table = [one if mirror is None else mirror for mirror, one in mirrors][3:]

        def cached(seq: int, length: int) -> list[torch.Tensor]:
            """A sequence's keys and values, [1, kv heads, length, dim]: views where its pages are neighbours."""
            count = -(-length // page_size)
            order = table[seq, :count].tolist()
            if order == list(range(order[0], order[0] + count)):
                parts = [cache[order[0] : order[0] + count] for cache in (k_cache, v_cache)]
            else:
                parts = [cache.index_select(0, block_table[seq, :count]) for cache in (k_cache, v_cache)]
            return [part.flatten(0, 1)[:length].transpose(0, 1).unsqueeze(0) for part in parts]

        def launch() -> None:
            starts = starts_of.tolist()
            with sdpa_kernel(FASTEST, set_priority=True):
                for seq, length in enumerate(lengths_of.tolist()):
                    rows = slice(starts[seq], starts[seq + 1])
                    if length == 0:
                        results[:, :, rows].zero_()
                    elif rows.start < rows.stop:
                        results[:, :, rows].copy_(mix(queries[:, :, rows], *cached(seq, length)))
            if starts[-1] < len(y):
                y[starts[-1] :].zero_()

        return launch


class SdpaHalf(Sdpa):
    """The same, with weights rounded to the cache's two bytes before they meet the values."""

    precision = 1e-5
    takes = {"cache_format": ("bf16", "f16")}


class Gathered(TorchKernel):
    """Each row against all that its sequence's pages have room for; what it does not see is masked.

    Nothing of it depends on what lengths and pages are, so that a graph can hold it; but it takes as long as the pages
    have room.
    """

    ops = ("attention",)
    name = "gathered"
    precision = 1e-9
    devices = ("cuda",)
    takes: Mapping[str, object] = {"cache_format": FLOATS, "m": "..8"}
    input_formats = FLOATS
    output_formats = FLOATS
    packed = "f32"
    # With sinks, a chunk, a window and a soft cap.
    on_card = 48
    # Keys and values are copied twice.
    efficiency = Efficiency(reading=0.1, multiplying=0.05)

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [self.input_formats, *([value.format] for value in node.inputs[1:])]

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        q, k_cache, v_cache, query_start, kv_len, block_table = tensors.inputs
        (y,) = tensors.outputs
        heads = (len(q), node.num_kv_heads, -1, node.head_dim)
        # [m, kv heads, group, dim]: query head h reads kv head h // group.
        queries, results = q.view(heads), y.view(heads)
        rows = torch.arange(len(q), dtype=torch.int32, device=q.device)
        cells = torch.arange(block_table.shape[1] * k_cache.shape[1], dtype=torch.int32, device=q.device)
        sinks = tensors.packed[0].view(1, node.num_kv_heads, -1, 1) if node.weight else None
        each = max(1, GATHERED // max(1, len(cells) * node.num_kv_heads * node.head_dim))

        ends = query_start[1:]

        def launch() -> None:
            sequence = torch.searchsorted(ends, rows, right=True).clamp_(max=len(ends) - 1)
            # A row of no sequence sees nothing.
            position = (kv_len - ends)[sequence].add_(rows).masked_fill_(rows >= ends[-1], -1)
            pages = block_table[sequence].clamp_(0, len(k_cache) - 1)
            for start in range(0, len(q), each):
                part = slice(start, start + each)
                seen = sees(position[part], cells, node.window, node.chunk)
                keys, values = (cache[pages[part]].float().flatten(1, 2) for cache in (k_cache, v_cache))
                given = queries[part].float(), keys.transpose(1, 2), values.transpose(1, 2)
                results[part] = _mixed(node, *given, seen, sinks)

        return launch


def _mixed(
    node: TensorNode,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """q [rows, kv heads, group, dim] against keys and values [rows, kv heads, cells, dim], as q is; float32.

    Cells that are not seen may hold anything; values are made zeros there. Zeros where none is seen.
    """
    unseen = ~seen[:, None, None]
    scores = (q @ keys.transpose(2, 3)).mul_(node.scale)
    if node.soft_cap:
        scores = scores.div_(node.soft_cap).tanh_().mul_(node.soft_cap)
    scores = scores.masked_fill_(unseen, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], dim=-1)
    # NaN where nothing is seen.
    shares = scores.softmax(-1)[..., : len(seen[0])].masked_fill_(unseen, 0)
    return shares @ values.masked_fill_(unseen.transpose(2, 3), 0)


def _attends(node: TensorNode, q: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function of one sequence's q [1, heads, rows, dim], keys and values [1, kv heads, length, dim], as q is."""
    attend = partial(scaled_dot_product_attention, scale=node.scale, enable_gqa=True)
    # torch's causal_lower_right calls the same; importing it would import the whole of torch._dynamo.
    flash = partial(
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        dropout_p=0.0,
        is_causal=True,
        return_debug_mask=False,
        scale=node.scale,
    )
    takes_flash = q.dtype != torch.float32 and node.head_dim % 8 == 0 and node.head_dim <= 256
    takes_flash = takes_flash and q.is_cuda and torch.cuda.get_device_capability(q.device) >= (8, 0)

    def mix(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        rows, length = q.shape[2], keys.shape[2]
        if not node.window and rows in (1, length):
            return attend(q, keys, values, is_causal=rows > 1)
        if not node.window and takes_flash:
            return flash(q, keys, values)[0]
        return attend(q, keys, values, attn_mask=visible(rows, length, node.window, q.device))

    return mix
