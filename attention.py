"""attention on CUDA through torch's fused kernels: one call a sequence, for steps of many rows.

Which rows and pages there are is read from the step state's host mirror, so that the device is not waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Answer, Declined, Kernel, Launch, Tensors
from kernelmux.ops.attention import visible
from kernelmux_torch.elementwise import FLOATS

ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""By speed at prefill on an H100; torch takes the first that can."""

FEW_ROWS = 64
"""Rows up to which a launch for each of them beats a call for each sequence."""


def offer(node: TensorNode, m: int, cache_format: str, paged: Sequence[Kernel | Declined]) -> Answer:
    """`paged` and torch's, best first."""
    sdpa: Kernel | Declined = Sdpa() if cache_format == "f32" else HalfSdpa()
    if node.soft_cap:
        sdpa = Declined("torch's attention has no soft cap", "unsupported", "sdpa")
    elif cache_format not in FLOATS:
        sdpa = Declined(f"torch attends to caches in {', '.join(FLOATS)}, not {cache_format}", "format", "sdpa")
    return [*paged, sdpa] if m <= FEW_ROWS else [sdpa, *paged]


class Sdpa(Kernel):
    """Float32 throughout."""

    name = "sdpa"
    precision = 1e-9
    # A launch reads the host mirror, and allocates.
    capturable = False

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        # torch wants queries in the type of keys and values.
        return [[node.inputs[1].format], *([value.format] for value in node.inputs[1:])]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [[node.inputs[1].format]]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        q, k_cache, v_cache, *state = tensors.inputs
        (y,) = tensors.outputs
        # Without a mirror the state itself is read, which waits for the device.
        mirrors = [mirror for mirror in tensors.host[3:] if mirror is not None] or state
        query_start, kv_len, block_table = mirrors
        # [1, heads, m, dim]
        queries, results = (t.view(1, len(t), node.num_heads, node.head_dim).transpose(1, 2) for t in (q, y))
        page_size = k_cache.shape[1]

        def launch() -> None:
            starts = query_start.tolist()
            with sdpa_kernel(ORDER, set_priority=True):
                for seq, length in enumerate(kv_len.tolist()):
                    rows = slice(starts[seq], starts[seq + 1])
                    if length == 0:
                        results[:, :, rows].zero_()
                    elif rows.start < rows.stop:
                        count = -(-length // page_size)
                        pages = _pages(block_table[seq, :count].tolist(), state[2][seq, :count])
                        keys, values = (_gathered(cache, pages, length) for cache in (k_cache, v_cache))
                        results[:, :, rows].copy_(_one_sequence(node, queries[:, :, rows], keys, values))
            if starts[-1] < len(y):
                y[starts[-1] :].zero_()

        return launch


class HalfSdpa(Sdpa):
    """Products in the cache's 16-bit format, sums in float32."""

    precision = 2e-5


def _pages(order: list[int], pages: torch.Tensor) -> slice | torch.Tensor:
    """A sequence's pages: a slice, which copies nothing, where they are neighbours, else their numbers."""
    first = order[0]
    return slice(first, first + len(order)) if order == list(range(first, first + len(order))) else pages


def _gathered(cache: torch.Tensor, pages: slice | torch.Tensor, length: int) -> torch.Tensor:
    """[1, kv heads, length, dim] of a cache [pages, page_size, kv heads, dim]."""
    read = cache[pages] if isinstance(pages, slice) else cache.index_select(0, pages)
    return read.flatten(0, 1)[:length].transpose(0, 1).unsqueeze(0)


def _one_sequence(node: TensorNode, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """q [1, heads, rows, dim] against keys and values [1, kv heads, length, dim]; the shape of q."""
    rows, length = q.shape[2], keys.shape[2]
    grouped = node.num_heads != node.num_kv_heads
    if grouped and q.dtype == torch.float32:
        # The fused kernel that takes float32 knows no groups, and the one that does holds all scores at once.
        group = node.num_heads // node.num_kv_heads
        keys, values = (cached.repeat_interleave(group, dim=1) for cached in (keys, values))
        grouped = False
    mask: Any = None
    if node.window:
        mask = visible(rows, length, node.window, q.device)
    elif 1 < rows < length:
        mask = causal_lower_right(rows, length)
    whole = mask is None and rows > 1
    return scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, is_causal=whole, scale=node.scale, enable_gqa=grouped
    )
