"""attention for decoding, in CUDA C: lengths and pages are read on the device, so that a graph can hold it.

What a row sees is cut into splits, which blocks attend to at once; a second kernel weighs what they found.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kernelmux.contract import Declined, Device, Kernel, Launch, Tensors, in_turn
from kernelmux.graph.formats import lookup
from kernelmux.graph.graph import TensorNode
from kernelmux_cupy.formats import FLOATS, formats
from kernelmux_cupy.launch import bind
from kernelmux_cupy.source import function

ROWS = 64
"""Rows up to which each may as well read the cache by itself."""
HEAD_DIM = 256
QUERIES = 8
"""Queries of one kv head that a block takes at most."""
THREADS = 128
BLOCKS = 4
"""Blocks that keep a multiprocessor busy."""
SPLITS = 64
"""Splits at most; attention.cu says so too."""
LOAD = 16
"""Bytes that a thread loads at once."""


class Attention(Kernel):
    """Scores, weights and sums in float32."""

    ops = ("attention",)
    name = "f32"
    precision = 1e-9
    launches = 2
    takes = {"m": f"..{ROWS}", "head_dim": f"..{HEAD_DIM}", "cache_format": FLOATS}
    input_formats = output_formats = FLOATS

    def refuses(self, node: TensorNode) -> Declined | None:
        (_, cache, values, *_), dim = formats(node.inputs), node.head_dim
        if values != cache:
            return Declined(f"it reads keys and values of one format, not {cache} and {values}", "format")
        if dim % (whole := LOAD // lookup(cache).dtype.itemsize):
            return Declined(f"it loads {whole} numbers of {cache} at once, head_dim is {dim}", "alignment")
        if node.chunk:
            return Declined("it reads no chunks apart", "unsupported")
        return Declined("it has no sinks", "unsupported") if node.weight else None

    def workspace(self, node: TensorNode) -> int:
        m, splits = node.rows, self._splits(node)
        # Of each split the weighted values, the largest score and the sum of weights.
        return 4 * m * node.num_heads * splits * (node.head_dim + 2) if splits > 1 else 0

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        q, k_cache, v_cache, query_start, kv_len, block_table = tensors.inputs
        (y,), splits, tiles = tensors.outputs, self._splits(node), _tiles(node)
        m, heads, kv_heads, dim = len(q), node.num_heads, node.num_kv_heads, node.head_dim
        q_format, cache, *_ = formats(node.inputs)
        shape = {"D": dim, "GROUP": -(-(heads // kv_heads) // tiles), "PAGE": k_cache.shape[1]}
        stored = {"Q": q_format, "CACHE": cache, "Y": node.outputs[0].format}
        attend = function("attention", "attend", self.device, **stored, **shape, WHOLE=int(splits == 1))
        found, weights = y, None
        if splits > 1:
            assert tensors.workspace is not None
            rows = m * heads * splits
            found, weights = tensors.workspace.view(torch.float32).split([rows * dim, rows * 2])
        state = (query_start, kv_len, block_table, np.int32(len(kv_len)), np.int32(block_table.shape[1]))
        scores = (np.float32(node.scale), np.float32(node.soft_cap or 0.0), np.int32(node.window or 0))
        args = (q, found, weights, k_cache, v_cache, *state, *scores, np.int32(heads), np.int32(kv_heads))
        first = bind(attend, (m, kv_heads * tiles, splits), (THREADS,), args, stream)
        if splits == 1:
            return first
        weigh = function("attention", "weigh", self.device, **stored, **shape, WHOLE=0)
        threads = -(-dim // 32) * 32
        second = bind(weigh, (m * heads,), (threads,), (found, weights, y, np.int32(splits)), stream)
        return in_turn(first, second)

    def _splits(self, node: TensorNode) -> int:
        """As many as the device has room for, by the rows: how long sequences are is not known before a launch."""
        rows = node.rows * node.num_kv_heads * _tiles(node)
        return min(SPLITS, max(1, _at_once(self.device) // rows))


def _at_once(device: Device) -> int:
    """Blocks that keep a device busy."""
    return BLOCKS * device.processors


def _tiles(node: TensorNode) -> int:
    """Blocks that the queries of one kv head take."""
    return -(-(node.num_heads // node.num_kv_heads) // QUERIES)
