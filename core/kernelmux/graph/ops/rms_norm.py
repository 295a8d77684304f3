"""rms_norm: rows scaled to unit root mean square, then by gamma."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.axes import COLUMNS, ROWS, SPREADS, STORED, as_stored, fits_f16
from kernelmux.graph.ops.cases import LONG_ROWS, MANY_ROWS, ROW_COUNTS, Case, extreme_cases, like
from kernelmux.graph.ops.domain import Domain, Point
from kernelmux.graph.ops.op import Op, Operands, column_count, own_fields, row_count

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
    told = {"m": row_count, "hidden_dim": column_count, **own_fields("epsilon")}

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

    def domain(self) -> Domain:
        return norm_domain(self)

    def cases(self) -> Iterator[Case]:
        sizes = [(m, k) for m in ROW_COUNTS for k in ((576, 640, 2048, 4096, 127, 1) if m < 128 else (576, 127))]
        for m, k in (*sizes, *((5, k) for k in LONG_ROWS), (MANY_ROWS, 3)):
            yield norm_case(self, f"m{m}-k{k}", m, k)
        # Tiny rows, where epsilon decides the answer: a kernel that drops it is off by orders of magnitude.
        yield norm_case(self, "tiny", 4, 64, scale=1e-3)
        yield norm_case(self, "huge", 2, 576, epsilon=1e-6, scale=1e4)
        yield from extreme_cases(self, (3, 200), {"gamma": (Value("gamma", (200,)),), "epsilon": 1e-6})


def norm_case(op: Op, label: str, m: int, k: int, epsilon: float = 1e-5, scale: float = 1.0) -> Case:
    """A case of an op that takes gamma and epsilon, all its inputs drawn from N(0, scale²)."""
    import torch

    fields = {"gamma": (Value("gamma", (k,)),), "epsilon": epsilon}
    draw = dict.fromkeys(op.inputs, lambda generator: torch.randn(m, k, generator=generator) * scale)
    return op.make_case(label, [Value(port, (m, k)) for port in op.inputs], fields, draw)


def norm_domain(op: Op) -> Domain:
    """Of an op that takes gamma and epsilon, and whose inputs are all normed or added."""

    def case(label: str, point: Point) -> Case:
        made = norm_case(op, label, point["m"], point["k"], point["epsilon"])
        return as_stored(like(point["values"], made), point["stored"])

    return Domain(
        case,
        # An outlier decides its row's mean: float32 sums, the rest of which is lost beside it, are a case by hand.
        {"epsilon": (1e-5, 1e-6), "values": (*(s for s in SPREADS if s != "outliers"), "small", "large"), **STORED},
        {"m": ROWS, "k": COLUMNS},
        work=lambda point: (len(op.inputs) + 1) * point["m"] * point["k"],
        holds=fits_f16,
    )
