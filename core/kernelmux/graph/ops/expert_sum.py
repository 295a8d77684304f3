"""expert_sum: what a row's experts have made of it, weighed and added."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.axes import ROWS, STORED, as_stored, fits_f16
from kernelmux.graph.ops.cases import ROW_COUNTS, Case, at_extremes, like
from kernelmux.graph.ops.domain import Domain, Extent, Point
from kernelmux.graph.ops.op import Op, Operands, elements, row_count

if TYPE_CHECKING:
    import torch

    from kernelmux.graph.graph import TensorNode


class ExpertSum(Op):
    """y[i] = sum over j of weights[i, j] * x[i, j].

    Axes: m rows, top_k experts of each, n columns.
    Inputs: x [m, top_k * n], a row's experts side by side; weights [m, top_k].
    Outputs: y [m, n].
    Numerics: summed in float32 at least, rounded once.
    """

    name = "expert_sum"
    inputs = ("x", "weights")
    outputs = ("y",)
    told = {
        "m": row_count,
        "n": lambda node: columns_of(node),
        "top_k": lambda node: node.inputs[1].shape[1],
    }

    def infer(self, node: TensorNode, format: str) -> tuple[Value, ...]:
        x, weights = node.inputs
        self.require_rows(node, x, weights)
        columns, top_k = x.shape[1], weights.shape[1]
        fits = isinstance(columns, int) and isinstance(top_k, int) and top_k > 0 and columns % top_k == 0
        self.require(fits, node, f"{x.name} is {x.shape}, {weights.name} is {weights.shape}: not as many each")
        return (self.output(node, 0, (x.shape[0], columns_of(node)), format),)

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        x, weights = operands.inputs
        return ((x.reshape(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1),)

    def flops(self, node: TensorNode) -> int:
        return 2 * elements(node.inputs[0])

    def domain(self) -> Domain:
        def case(label: str, point: Point) -> Case:
            made = self._case(label, point["m"], point["top_k"], point["n"])
            return as_stored(like(point["values"], made, "x"), point["stored"])

        return Domain(
            case,
            # Where rows are alike few sums differ, and may all be small by chance.
            {"top_k": (2, 1, 4, 6, 8, 10), "values": ("noise", "outliers", "denormals", "uneven", "zeros"), **STORED},
            {"m": ROWS, "n": Extent(1, 8192, known=(2880, 3584), plain=64)},
            work=lambda point: point["m"] * (point["top_k"] + 1) * point["n"],
            holds=lambda point: fits_f16(point) and point["m"] * point["n"] >= 32,
        )

    def cases(self) -> Iterator[Case]:
        for m in ROW_COUNTS:
            for top_k, n in ((2, 576), (8, 127), (4, 2049)) if m < 128 else ((8, 640),):
                yield self._case(f"m{m}-of{top_k}-n{n}", m, top_k, n)
        yield from at_extremes(lambda name: self._case(name, 3, 4, 200), "x")

    def _case(self, label: str, m: int, top_k: int, n: int) -> Case:
        return self.make_case(label, [Value("x", (m, top_k * n)), Value("weights", (m, top_k))])


def columns_of(node: TensorNode) -> int:
    """Columns that each expert has made."""
    columns, top_k = (value.shape[1] for value in node.inputs)
    assert isinstance(columns, int)
    assert isinstance(top_k, int)
    return columns // top_k
