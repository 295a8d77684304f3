"""silu: the sigmoid-weighted linear unit, the gate of a llama feed-forward layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.axes import SPREADS
from kernelmux.graph.ops.cases import Case
from kernelmux.graph.ops.op import Elementwise, Operands

if TYPE_CHECKING:
    import torch

    from kernelmux.graph.graph import TensorNode


class Silu(Elementwise):
    """y = x / (1 + exp(-x)).

    Axes: m rows, n columns.
    Inputs: x [m, n].
    Outputs: y [m, n]; may be x's memory.
    Numerics: tiny and not 0 for x down to -80, never NaN below: exp(-x) may overflow to infinity.
    """

    name = "silu"
    inputs = ("x",)
    outputs = ("y",)
    in_place = ((0, 0),)
    spreads = (*SPREADS, "large", "far-below-zero")

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        (x,) = operands.inputs
        return (x / (1 + (-x).exp()),)

    def flops(self, node: TensorNode) -> int:
        return 4 * super().flops(node)

    def cases(self) -> Iterator[Case]:
        import torch

        yield from super().cases()
        extremes = torch.tensor([[-1e4, -100.0, -89.0, -1e-30, 0.0, 1e-30, 89.0, 1e4]])
        draw = {"x": lambda generator: extremes.clone()}
        yield self.make_case("far", [Value("x", (1, 8))], draw=draw, smoke=False)
