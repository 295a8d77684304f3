"""mul_mat_id: each row of activations by the panels of its experts, which a launch looks up."""

from __future__ import annotations

from collections.abc import Sequence

from kernelmux.contract import Declined, Efficiency, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux.graph.ops.mul_mat_id import outputs_of
from kernelmux_numba.mul_mat import PART, Int16
from kernelmux_numba.packing import BLOCK
from kernelmux_numba.team import Phase, shares

WIDEST = 16
"""Lanes of the widest vectors: experts whose outputs are a multiple have panels of their own on any processor."""


class Int16Experts(Int16):
    """A row at a time, whatever its expert has beside it: for the few rows of decoding."""

    ops = ("mul_mat_id",)

    def reaches(self, node: TensorNode) -> Efficiency:
        # Of more rows each unpacks an expert's integers anew.
        return Efficiency(reading=0.8, multiplying=0.2)

    def refuses(self, node: TensorNode) -> Declined | None:
        if (n := outputs_of(node)) % WIDEST:
            return Declined(f"it takes a multiple of {WIDEST} outputs an expert, not {n}", "alignment")
        return super().refuses(node)

    def phases(self, node: TensorNode, tensors: Tensors) -> Sequence[Phase]:
        (x, ids), (y,), (panels, *biases) = tensors.inputs, tensors.outputs, tensors.packed
        (weight,), places = node.weight, ids.numel()
        n, k = outputs_of(node), weight.extents[1]
        rows, each = x.numel() // k, n // self.lanes
        at_once, parts = shares(places * each, max(1, PART // (self.lanes * k)))
        of_product = (panels, panels.shape[1], k // BLOCK, n, rows, *self.activations(node, weight.format, tensors))
        _, constants = self.function(weight.format)
        words = (*of_product, y, 0, None, 0, *(biases or [None]), at_once, ids, each, places, places // rows)
        return [*self.before(node, tensors), [self.piece("experts:quantised", constants, words, parts)]]
