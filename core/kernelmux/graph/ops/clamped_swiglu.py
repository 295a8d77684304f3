"""clamped_swiglu: the gated activation of gpt-oss's experts, of clamped gates and ups."""

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


class ClampedSwiglu(Elementwise):
    """y = (u + 1) * g / (1 + exp(-alpha * g)), g = min(gate, limit), u = up between -limit and limit.

    Axes: m rows, n columns.
    Inputs: gate, up [m, n]; limit > 0; alpha > 0.
    Outputs: y [m, n]; may be gate's or up's memory.
    Numerics: OpenAI 2025 (arXiv:2508.10925), alpha 1.702 and limit 7; 0 for gates far below 0, never NaN.
    """

    name = "clamped_swiglu"
    inputs = ("gate", "up")
    outputs = ("y",)
    fields = ("limit", "alpha")
    in_place = ((0, 0), (1, 0))
    told = {**Elementwise.told, **own_fields("limit", "alpha")}
    spreads = (*SPREADS, "large", "far-below-zero")

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        gate, up = operands.inputs
        gate, up = gate.clamp(max=node.limit), up.clamp(-node.limit, node.limit)
        return ((up + 1) * gate / (1 + (-node.alpha * gate).exp()),)

    def flops(self, node: TensorNode) -> int:
        return 8 * super().flops(node)

    def domain(self) -> Domain:
        return elementwise_domain(self, self.spreads, {"limit": (7.0, 0.5), "alpha": (1.702, 1.0)})

    def cases(self) -> Iterator[Case]:
        import torch

        fields = {"limit": 7.0, "alpha": 1.702}
        yield from elementwise_cases(self, fields)
        numbers = torch.tensor([-1e30, -100.0, -7.1, -7.0, -1.0, -1e-6, 0.0, 1e-6, 6.9, 7.0, 7.1, 1e4, 1e30])
        pairs = torch.cartesian_prod(numbers, numbers)
        draw = {port: lambda generator, of=of: pairs[:, of].view(1, -1).clone() for of, port in enumerate(self.inputs)}
        values = [Value(port, (1, len(pairs))) for port in self.inputs]
        yield self.make_case("far", values, fields, draw, smoke=False)
