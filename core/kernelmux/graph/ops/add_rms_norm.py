"""add_rms_norm: the residual connection and the norm after it, in one pass over the rows."""

from __future__ import annotations

from collections.abc import Iterator

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.cases import LONG_ROWS, ROW_COUNTS, Case, extreme_cases
from kernelmux.graph.ops.domain import Domain
from kernelmux.graph.ops.fused import Fused, Part
from kernelmux.graph.ops.rms_norm import RmsNorm, norm_case, norm_domain


class AddRmsNorm(Fused):
    """sum = a + b; y = rms_norm(sum).

    Axes: m rows, hidden_dim columns.
    Inputs: a, b [m, hidden_dim]; gamma [hidden_dim]; epsilon > 0.
    Outputs: sum, y [m, hidden_dim]; sum may be a's or b's memory.
    Numerics: y is the norm of the unrounded or of the rounded sum.
    """

    name = "add_rms_norm"
    inputs = ("a", "b")
    outputs = ("sum", "y")
    fields = ("gamma", "epsilon")
    in_place = ((0, 0), (1, 0))
    pattern = (Part("add", ("a", "b"), ("sum",)), Part("rms_norm", ("sum",), ("y",)))
    told = RmsNorm.told

    def domain(self) -> Domain:
        return norm_domain(self)

    def cases(self) -> Iterator[Case]:
        sizes = [(m, k) for m in ROW_COUNTS for k in (576, 127)]
        for m, k in (*sizes, *((5, k) for k in (1, 640, 2048, 4096, *LONG_ROWS))):
            yield norm_case(self, f"m{m}-k{k}", m, k)
        # Tiny sums, where epsilon decides the answer.
        yield norm_case(self, "tiny", 4, 64, scale=1e-3)
        yield norm_case(self, "huge", 2, 576, scale=1e4)
        yield from extreme_cases(self, (3, 200), {"gamma": (Value("gamma", (200,)),), "epsilon": 1e-6})
