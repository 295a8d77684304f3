"""scale: a tensor times a number that the model states, as of embeddings, residuals and logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernelmux.graph.ops.axes import SPREADS
from kernelmux.graph.ops.cases import Case, elementwise_cases
from kernelmux.graph.ops.domain import Domain
from kernelmux.graph.ops.op import Elementwise, Operands, elementwise_domain, own_fields

if TYPE_CHECKING:
    import torch

    from kernelmux.graph.graph import TensorNode


class Scale(Elementwise):
    """y = scale * x.

    Axes: m rows, n columns.
    Inputs: x [m, n]; scale, not 0.
    Outputs: y [m, n]; may be x's memory.
    Numerics: rounded once, to y's format; scale in float32 or better.
    """

    name = "scale"
    inputs = ("x",)
    outputs = ("y",)
    fields = ("scale",)
    in_place = ((0, 0),)
    told = {**Elementwise.told, **own_fields("scale")}
    # As IEEE 754 has it.
    spreads = (*SPREADS, "nan-and-infinity")

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        (x,) = operands.inputs
        return (x * node.scale,)

    def domain(self) -> Domain:
        # Of hidden sizes up to 8192 the roots, granite's residuals and logits, and one that is no power of two.
        return elementwise_domain(
            self, self.spreads, {"scale": (8.0, 50.596442562694074, 73.32121111929344, 0.22, 0.0625, 12.0)}
        )

    def cases(self) -> Iterator[Case]:
        return elementwise_cases(self, {"scale": 25.298221281347036})
