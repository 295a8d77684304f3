"""mul: the product of two tensors, element by element, as gate and up of a feed-forward layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelmux.graph.ops.axes import SPREADS
from kernelmux.graph.ops.op import Elementwise, Operands

if TYPE_CHECKING:
    import torch

    from kernelmux.graph.graph import TensorNode


class Mul(Elementwise):
    """y = a * b.

    Axes: m rows, n columns.
    Inputs: a [m, n]; b [m, n]. No broadcasting.
    Outputs: y [m, n]; may be a's or b's memory.
    Numerics: rounded once, to y's format.
    """

    name = "mul"
    inputs = ("a", "b")
    outputs = ("y",)
    in_place = ((0, 0), (1, 0))
    # As IEEE 754 has it.
    spreads = (*SPREADS, "large", "nan-and-infinity")

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        a, b = operands.inputs
        return (a * b,)
