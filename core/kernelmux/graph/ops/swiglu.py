"""swiglu: the gated activation of a llama feed-forward layer."""

from __future__ import annotations

from collections.abc import Iterator

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.fused import Fused, Part
from kernelmux.graph.ops.op import LONG_ROWS, ROW_COUNTS, Case, column_count, extreme_cases, marks, row_count


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
    told = {"m": row_count, "n": column_count}

    def cases(self) -> Iterator[Case]:
        import torch

        shapes = [(m, n) for m in ROW_COUNTS for n in (1536, 127)]
        for m, n in (*shapes, (3, 1), *((5, n) for n in LONG_ROWS)):
            yield Case(f"swiglu-m{m}-n{n}", self.name, (Value("gate", (m, n)), Value("up", (m, n))), marks=marks(m))
        yield from extreme_cases(self, (3, 200))
        far = {"gate": lambda generator: torch.tensor([[-1e4, -100.0, -89.0, 0.0, 89.0, 100.0, 1e4]])}
        yield Case("swiglu-far", self.name, (Value("gate", (1, 7)), Value("up", (1, 7))), {}, far, marks=marks(1))
