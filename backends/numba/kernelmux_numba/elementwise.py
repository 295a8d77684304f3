"""add, mul, silu and swiglu: one pass over the elements, in any mix of formats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kernelmux.contract import Tensors
from kernelmux.graph.formats import Value, as_tuple
from kernelmux.graph.graph import TensorNode
from kernelmux_numba.kernel import ELEMENTS, NumbaKernel
from kernelmux_numba.norm import FOR_PRODUCTS
from kernelmux_numba.packing import BLOCK
from kernelmux_numba.team import Phase, Piece, shares

FLOATS = ("f32", "bf16", "f16")


class Elementwise(NumbaKernel):
    ops: tuple[str, ...] = ("add", "mul", "silu")
    name = "f32"
    precision = 1e-11
    input_formats: Sequence[str] = FLOATS
    output_formats: Sequence[str] = FLOATS

    def phases(self, node: TensorNode, tensors: Tensors) -> Sequence[Phase]:
        return [[one_by_one(self, node.op, node.inputs, node.outputs[0], (*tensors.inputs, *tensors.outputs))]]


class Swiglu(Elementwise):
    ops = ("swiglu",)
    input_formats = ("f32",)
    output_formats = FOR_PRODUCTS


def one_by_one(kernel: NumbaKernel, op: str, inputs: Sequence[Value], output: Value, tensors: Sequence[Any]) -> Piece:
    """An op of that name in `code/elementwise.py`, of tensors of one shape, the output last."""
    count = math.prod(output.extents)
    blocks, parts = shares(-(-count // BLOCK), ELEMENTS // BLOCK)
    words = (count, blocks * BLOCK, *(plane for tensor in tensors for plane in as_tuple(tensor)))
    formats = tuple(value.format for value in inputs), output.format
    return kernel.piece("elementwise:elementwise", (op, *formats), words, parts)
