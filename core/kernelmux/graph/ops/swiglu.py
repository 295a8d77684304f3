"""swiglu: the gated activation of a llama feed-forward layer."""

from __future__ import annotations

from collections.abc import Iterator

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.axes import SPREADS
from kernelmux.graph.ops.cases import LONG_ROWS, ROW_COUNTS, Case, extreme_cases
from kernelmux.graph.ops.domain import Domain
from kernelmux.graph.ops.fused import Fused, Part
from kernelmux.graph.ops.op import Elementwise, elementwise_domain


class Swiglu(Fused):
    """y = silu(gate) * up (Shazeer 2020, arXiv:2002.05202).

    Axes: m rows, n columns.
    Inputs: gate, up [m, n].
    Outputs: y [m, n]; may be gate's or up's memory.
    Numerics: as silu and mul, rounded once.
    """

    name = "swiglu"
    inputs = ("gate", "up")
    outputs = ("y",)
    in_place = ((0, 0), (1, 0))
    pattern = (Part("silu", ("gate",), ("gated",)), Part("mul", ("gated", "up"), ("y",)))
    told = Elementwise.told

    def domain(self) -> Domain:
        return elementwise_domain(self, (*SPREADS, "far-below-zero"))

    def cases(self) -> Iterator[Case]:
        import torch

        shapes = [(m, n) for m in ROW_COUNTS for n in (1536, 127)]
        for m, n in (*shapes, (3, 1), *((5, n) for n in LONG_ROWS)):
            yield self.make_case(f"m{m}-n{n}", [Value("gate", (m, n)), Value("up", (m, n))])
        yield from extreme_cases(self, (3, 200))
        far = {"gate": lambda generator: torch.tensor([[-1e4, -100.0, -89.0, 0.0, 89.0, 100.0, 1e4]])}
        yield self.make_case("far", [Value("gate", (1, 7)), Value("up", (1, 7))], draw=far)
