"""gelu: the Gaussian error linear unit in its tanh form, the gate of a gemma feed-forward layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.axes import SPREADS
from kernelmux.graph.ops.cases import Case
from kernelmux.graph.ops.op import Elementwise, Operands

if TYPE_CHECKING:
    import torch

    from kernelmux.graph.graph import TensorNode


class Gelu(Elementwise):
    """y = x / 2 * (1 + tanh(√(2/π) * (x + 0.044715 x³))).

    Axes: m rows, n columns.
    Inputs: x [m, n].
    Outputs: y [m, n]; may be x's memory.
    Numerics: Hendrycks and Gimpel 2016 (arXiv:1606.08415); 0 for x far below 0, never NaN: x³ may overflow to infinity.
    """

    name = "gelu"
    inputs = ("x",)
    outputs = ("y",)
    in_place = ((0, 0),)
    spreads = (*SPREADS, "large")

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        (x,) = operands.inputs
        # (1 + tanh(u)) / 2 is the sigmoid of 2u, which keeps its digits where tanh is nearly -1.
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))
        return (x / (1 + (-2 * inner).exp()),)

    def flops(self, node: TensorNode) -> int:
        return 8 * super().flops(node)

    def cases(self) -> Iterator[Case]:
        import torch

        yield from super().cases()
        extremes = torch.tensor([[-1e14, -1e4, -20.0, -5.0, -1e-30, 0.0, 1e-30, 5.0, 20.0, 1e4]])
        draw = {"x": lambda generator: extremes.clone()}
        yield self.make_case("far", [Value("x", (1, 10))], draw=draw, smoke=False)
