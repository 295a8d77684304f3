"""embed on CUDA: rows gathered by torch's index_select, from the dense tables that a tied lm_head shares."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from kernelmux.contract.hookspecs import Kernel, Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_torch import embed, mul_mat


def offer(has_weight: bool) -> list[Kernel]:
    """The kernels for a table that is a weight, or for one that is computed."""
    return [Bf16(), F32()] if has_weight else [embed.Rows()]


class F32(mul_mat.F32):
    """The table in float32, packed as the mul_mat of this name packs its weight."""

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [["i32"]]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (ids,), (table,), (y,) = tensors.inputs, tensors.packed, tensors.outputs
        return partial(torch.index_select, table, 0, ids, out=y)


class Bf16(F32):
    """The same in bfloat16."""

    name = "bf16"
    precision = 1e-5
    packed = "bf16"
    dtype = torch.bfloat16

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [["bf16"]]
