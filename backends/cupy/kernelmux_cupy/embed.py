"""embed: only the rows that are looked up are read and dequantised; the table stays as the file holds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kernelmux.contract import Kernel, Launch, Tensors
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Weight
from kernelmux.graph.graph import TensorNode
from kernelmux_cupy.formats import FLOATS, formats
from kernelmux_cupy.launch import bind
from kernelmux_cupy.source import function

BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""The types of blocks.cuh."""
THREADS = 256


class Embed(Kernel):
    """Each number from its block, in float32."""

    ops = ("embed",)
    name = "f32"
    precision = 1e-11
    packed = "file"
    takes = {"table_format": (*FLOATS, *BLOCKS)}
    input_formats = output_formats = FLOATS

    def packed_bytes(self, node: TensorNode) -> int:
        return sum(value.nbytes for value in node.weight)

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        return tuple(weight.planes[0].to(device.torch).contiguous() for weight in weights)

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        ids, table = (*tensors.inputs, *tensors.packed)
        (y,), (table_format,) = tensors.outputs, formats((*node.inputs[1:], *node.weight))
        run = function("embed", "embed", self.device, TABLE=table_format, Y=node.outputs[0].format)
        m, columns = y.shape
        return bind(run, (m, -(-columns // THREADS)), (THREADS,), (ids, table, y, np.int32(columns)), stream)
