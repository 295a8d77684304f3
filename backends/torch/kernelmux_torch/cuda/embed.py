"""embed on CUDA: rows gathered by torch's index_select, from the dense tables that a tied lm_head shares."""

from __future__ import annotations

from functools import partial

import torch

from kernelmux.contract import Declined, Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_torch import mul_mat


class F32(mul_mat.F32):
    """The table in float32, packed as the mul_mat of this name packs its weight."""

    ops = ("embed",)
    devices = ("cuda", "rocm")

    def refuses(self, node: TensorNode) -> Declined | None:
        return None if node.weight else Declined("it looks rows up in a weight", "unsupported")

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        (ids,), (table,), (y,) = tensors.inputs, tensors.packed, tensors.outputs
        return partial(torch.index_select, table, 0, ids, out=y)


class Bf16(F32):
    """The same in bfloat16."""

    name = "bf16"
    precision = 1e-5
    packed = "bf16"
    output_formats = ("bf16",)
