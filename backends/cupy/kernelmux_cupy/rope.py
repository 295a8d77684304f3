"""rope: queries and keys in one launch of a CUDA C kernel."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from kernelmux.contract import Kernel, Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux.graph.ops import Rotation
from kernelmux_cupy.formats import FLOATS, formats
from kernelmux_cupy.launch import bind
from kernelmux_cupy.source import function

HEADS = 8
"""Heads that a block turns: the angles of a row are computed once for them."""
PAIRS = 128
"""Pairs of a head for which every block has room; longer heads get a function of their own."""


class Rope(Kernel):
    """Angles in float64 up to whole turns, the rest in float32."""

    ops = ("rope",)
    name = "f32"
    precision = 1e-11
    packed = "f32"
    strided = True
    input_formats = output_formats = FLOATS

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        q, k, positions = tensors.inputs
        rotation = node.rotation
        assert rotation is not None
        (q_format, k_format, _), (q_out, k_out) = formats(node.inputs), formats(node.outputs)
        stored = {"Q": q_format, "K": k_format, "Q_OUT": q_out, "K_OUT": k_out}
        run = function("rope", "rope", self.device, **stored, MOST=max(PAIRS, rotation.dims // 2))
        divisors = tensors.packed[0] if tensors.packed else None
        extents = (rotation.dims, node.head_dim, node.num_heads, node.num_kv_heads, q.stride(0), k.stride(0))
        args = (q, k, *tensors.outputs, positions, _turns(rotation, q.device), divisors)
        numbers = (np.float32(rotation.magnitude), np.int32(rotation.pairing == "adjacent"), *map(np.int32, extents))
        blocks = -(-(node.num_heads + node.num_kv_heads) // HEADS)
        return bind(run, (len(positions), blocks), (32, HEADS), (*args, *numbers), stream)


@lru_cache(maxsize=16)
def _turns(rotation: Rotation, device: torch.device) -> torch.Tensor:
    """Turns a position, one a pair, in float64: every layer's, so made once."""
    # Divided on the host: a launch on another stream would not wait for the device to do it.
    return (torch.tensor(rotation.frequencies(), dtype=torch.float64) / (2 * math.pi)).to(device)
