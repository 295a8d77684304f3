"""embed: only the rows that are looked up are read and dequantised; the table stays as the file holds it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernelmux.contract import Declined, Device, Tensors
from kernelmux.graph.formats import Weight, as_tuple, row_bytes
from kernelmux.graph.graph import TensorNode
from kernelmux_numba.elementwise import FLOATS
from kernelmux_numba.kernel import ELEMENTS, NumbaKernel
from kernelmux_numba.packing import PACKINGS
from kernelmux_numba.team import Phase, shares

TABLES = (*FLOATS, *PACKINGS)


class Rows(NumbaKernel):
    ops = ("embed",)
    name = "rows"
    precision = 1e-11
    packed = "file"
    input_formats: Sequence[str] = FLOATS
    output_formats: Sequence[str] = ("f32", "q8_32", "bf16", "f16")

    def refuses(self, node: TensorNode) -> Declined | None:
        if node.weight and node.weight[0].format not in TABLES:
            return Declined(f"it takes tables in {', '.join(TABLES)}, not {node.weight[0].format}", "format")
        return None

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        return tuple(weight.planes[0] for weight in weights)

    def phases(self, node: TensorNode, tensors: Tensors) -> Sequence[Phase]:
        table = (*node.inputs, *node.weight)[1]
        ids, rows = (*tensors.inputs, *tensors.packed)
        m, k = node.outputs[0].extents
        each, parts = shares(m, -(-ELEMENTS // k))
        words = (m, each, k, ids, row_bytes(table.format, k), rows, *as_tuple(tensors.outputs[0]))
        return [[self.piece("embed:embed", (table.format, node.outputs[0].format), words, parts)]]
