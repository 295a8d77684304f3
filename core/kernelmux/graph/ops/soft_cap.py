"""soft_cap: numbers drawn smoothly into a range, as gemma's logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.axes import SPREADS
from kernelmux.graph.ops.cases import Case, elementwise_cases
from kernelmux.graph.ops.domain import Domain
from kernelmux.graph.ops.op import Elementwise, Operands, elementwise_domain, own_fields

if TYPE_CHECKING:
    import torch

    from kernelmux.graph.graph import TensorNode


class SoftCap(Elementwise):
    """y = soft_cap * tanh(x / soft_cap).

    Axes: m rows, n columns.
    Inputs: x [m, n]; soft_cap > 0.
    Outputs: y [m, n]; may be x's memory.
    Numerics: Gemma 2 (arXiv:2408.00118); soft_cap or -soft_cap for x far from 0, never NaN.
    """

    name = "soft_cap"
    inputs = ("x",)
    outputs = ("y",)
    fields = ("soft_cap",)
    in_place = ((0, 0),)
    told = {**Elementwise.told, **own_fields("soft_cap")}
    spreads = (*SPREADS, "large", "far-below-zero")

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        (x,) = operands.inputs
        return (node.soft_cap * (x / node.soft_cap).tanh(),)

    def flops(self, node: TensorNode) -> int:
        return 4 * super().flops(node)

    def domain(self) -> Domain:
        return elementwise_domain(self, self.spreads, {"soft_cap": (30.0, 50.0, 1.0)})

    def cases(self) -> Iterator[Case]:
        import torch

        yield from elementwise_cases(self, {"soft_cap": 30.0})
        extremes = torch.tensor([[-1e30, -1e4, -30.0, -1e-6, 0.0, 1e-6, 30.0, 1e4, 1e30]])
        draw = {"x": lambda generator: extremes.clone()}
        # A vocabulary's logits.
        yield self.make_case("m1-n256000", [Value("x", (1, 256_000))], {"soft_cap": 30.0})
        yield self.make_case("far", [Value("x", (1, 9))], {"soft_cap": 30.0}, draw, smoke=False)
