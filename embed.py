"""embed on CUDA: the table dense in one float format, of which torch gathers the rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from kernelmux.device import Device
from kernelmux.formats import Weight
from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Answer, Kernel, Launch, Tensors
from kernelmux_torch.elementwise import FLOATS
from kernelmux_torch.weights import dense


def offer(node: TensorNode) -> Answer:
    """The table in each float format, or the rows of an activation."""
    return [Bf16(), F16(), F32()] if node.weight else Rows()


class Rows(Kernel):
    """Rows of an activation, in its format."""

    name = "rows"
    precision = 1e-11

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [[node.inputs[1].format]]

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [["i32"], [node.inputs[1].format] if node.inputs[1].format in FLOATS else FLOATS]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        ids, table = (*tensors.inputs, *tensors.packed)
        return partial(torch.index_select, table, 0, ids, out=tensors.outputs[0])


class Bf16(Rows):
    """Each row rounded once, when the table is packed, as mul_mat packs it: tied embeddings are held once."""

    name = "bf16"
    packed = "bf16"
    dtype = torch.bfloat16

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [["i32"]]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [[self.name]]

    def packed_bytes(self, node: TensorNode) -> int:
        rows, columns = node.weight[0].extents
        return rows * columns * self.dtype.itemsize

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        return (dense(weights[0], self.dtype, device),)


class F16(Bf16):
    name = "f16"
    packed = "f16"
    dtype = torch.float16


class F32(Bf16):
    name = "f32"
    packed = "f32"
    dtype = torch.float32
