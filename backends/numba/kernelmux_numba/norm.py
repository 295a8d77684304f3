"""rms_norm, and with the addition before it: in eight bits too, so that products read it as it is."""

from __future__ import annotations

from collections.abc import Sequence

from kernelmux.contract import Tensors
from kernelmux.graph.formats import as_tuple
from kernelmux.graph.graph import TensorNode
from kernelmux_numba.kernel import ELEMENTS, NumbaKernel
from kernelmux_numba.team import Phase, shares

FOR_PRODUCTS = ("f32", "bf16", "q8_32")
"""What is written for products: as float32, or as those in bfloat16 or in eight bits read it. Without bfloat16 eight
bits would be the shortest way to it, and round twice."""


class RmsNorm(NumbaKernel):
    ops = ("rms_norm",)
    name = "f32"
    # Of 20,480 equal columns each of 32 sums is of 640, which are rounded the same way.
    precision = 1e-10
    packed = "f32"
    input_formats: Sequence[str] = ("f32",)
    output_formats: Sequence[str] = FOR_PRODUCTS

    def phases(self, node: TensorNode, tensors: Tensors) -> Sequence[Phase]:
        *sums, y = tensors.outputs
        x, *added = tensors.inputs
        m, k = node.inputs[0].extents
        each, parts = shares(m, -(-ELEMENTS // k))
        words = (m, each, k, float(node.epsilon), *tensors.packed, x, *as_tuple(y), *added, *sums)
        return [[self.piece("norm:norm", (bool(added), node.outputs[-1].format), words, parts)]]


class AddRmsNorm(RmsNorm):
    ops = ("add_rms_norm",)

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [("f32",), FOR_PRODUCTS]
