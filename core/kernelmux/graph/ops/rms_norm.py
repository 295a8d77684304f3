"""rms_norm: rows scaled to unit root mean square, then by gamma."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import TYPE_CHECKING

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.op import (
    LONG_ROWS,
    MANY_ROWS,
    ROW_COUNTS,
    Case,
    Op,
    Operands,
    column_count,
    extreme_cases,
    marks,
    row_count,
)

if TYPE_CHECKING:
    import torch

    from kernelmux.graph.graph import TensorNode


class RmsNorm(Op):
    """y = gamma * x / sqrt(mean(x²) + epsilon), row by row.

    Axes: m rows, hidden_dim columns.
    Inputs: x [m, hidden_dim]; gamma [hidden_dim]; epsilon > 0.
    Outputs: y [m, hidden_dim]; may be x's memory.
    Numerics: Zhang and Sennrich 2019 (arXiv:1910.07467); the mean in float32 or better.
    """

    name = "rms_norm"
    inputs = ("x",)
    outputs = ("y",)
    fields = ("gamma", "epsilon")
    in_place = ((0, 0),)
    told = {"m": row_count, "hidden_dim": column_count, "epsilon": attrgetter("epsilon")}

    def infer(self, node: TensorNode, format: str) -> tuple[Value, ...]:
        (x,) = node.inputs
        self.require(len(node.gamma) == 1, node, f"one gamma is needed, {len(node.gamma)} were given")
        (gamma,) = node.gamma
        self.require_rows(node, x)
        self.require(gamma.shape == x.shape[-1:], node, f"gamma is {gamma.shape}, x is {x.shape}")
        self.require(node.epsilon > 0, node, f"epsilon must be above 0, not {node.epsilon}")
        return (self.output(node, 0, x.shape, format),)

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        (x,) = operands.inputs
        mean = x.pow(2).mean(dim=-1, keepdim=True)
        return (operands.gamma[0] * x * (mean + node.epsilon).rsqrt(),)

    def flops(self, node: TensorNode) -> int:
        return 4 * super().flops(node)

    def cases(self) -> Iterator[Case]:
        for m in ROW_COUNTS:
            for k in (576, 640, 2048, 4096, 127, 1) if m < 128 else (576, 127):
                yield self._case(f"m{m}-k{k}", m, k, 1e-5)
        for m, k in (*((5, k) for k in LONG_ROWS), (MANY_ROWS, 3)):
            yield self._case(f"m{m}-k{k}", m, k, 1e-5)
        # Tiny rows, where epsilon decides the answer: a kernel that drops it is off by orders of magnitude.
        yield self._case("tiny", 4, 64, 1e-5, scale=1e-3)
        yield self._case("huge", 2, 576, 1e-6, scale=1e4)
        yield from extreme_cases(self, (3, 200), {"gamma": (Value("gamma", (200,)),), "epsilon": 1e-6})

    def _case(self, label: str, m: int, k: int, epsilon: float, scale: float = 1.0) -> Case:
        import torch

        fields = {"gamma": (Value("gamma", (k,)),), "epsilon": epsilon}
        draw = {"x": lambda generator: torch.randn(m, k, generator=generator) * scale}
        return Case(f"rms_norm-{label}", self.name, (Value("x", (m, k)),), fields, draw, marks=marks(m))
