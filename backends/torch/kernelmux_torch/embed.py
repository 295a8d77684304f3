"""embed: only the rows that are looked up are read and dequantised; the table stays as the file holds it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from kernelmux.contract import Declined, Launch, Tensors
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Weight, lookup
from kernelmux.graph.graph import TensorNode
from kernelmux_torch.kernel import FLOATS, TorchKernel


class Rows(TorchKernel):
    ops = ("embed",)
    name = "rows"
    precision = 1e-11
    packed = "file"
    input_formats = ("f32",)

    def refuses(self, node: TensorNode) -> Declined | None:
        if node.weight and self.device.kind != "cpu":
            return Declined("it decodes rows of a table on the CPU only", "device")
        if node.weight and len(lookup(node.weight[0].format).planes) > 1:
            return Declined(f"it looks rows up in tables of one plane, not {node.weight[0].format}", "format")
        return None

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS if node.weight else ["f32"]]

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        return tuple(weight.planes[0] for weight in weights)

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        ids, *tables = (*tensors.inputs, *tensors.packed)
        (table,), (y,) = tables, tensors.outputs
        if not node.weight:
            return partial(torch.index_select, table, 0, ids, out=y)
        format = node.weight[0].format
        shape = tuple(y.shape)

        def launch() -> None:
            y.copy_(Weight("rows", shape, format, (table[ids],)).dequantize())

        return launch
