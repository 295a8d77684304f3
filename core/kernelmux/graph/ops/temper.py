"""temper: rows multiplied by more the farther into a text they lie, so that attention stays sharp among more keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.axes import COLUMNS, CONTEXT, ROWS, SPREADS, STORED, as_stored, fits_f16
from kernelmux.graph.ops.cases import MANY_ROWS, ROW_COUNTS, Case, at_extremes, like
from kernelmux.graph.ops.domain import Domain, Extent, Point
from kernelmux.graph.ops.op import Op, Operands, column_count, own_fields, row_count

if TYPE_CHECKING:
    import torch

    from kernelmux.graph.graph import TensorNode


class Temper(Op):
    """y[i] = x[i] * (1 + scale * log(1 + floor((positions[i] + 1) / span))).

    Axes: m rows, n columns.
    Inputs: x [m, n]; positions [m], i32, from 0 on; scale > 0; span > 0, positions of which the factor is the same.
    Outputs: y [m, n]; may be x's memory.
    Numerics: the factor in float32 or better, its floor exact; Nakanishi 2025 (arXiv:2501.19399), as Llama 4 has it of
    queries without positions.
    """

    name = "temper"
    inputs = ("x", "positions")
    outputs = ("y",)
    fields = ("scale", "span")
    in_place = ((0, 0),)
    told = {"m": row_count, "n": column_count, **own_fields("scale", "span")}

    def infer(self, node: TensorNode, format: str) -> tuple[Value, ...]:
        x, positions = node.inputs
        self.require_rows(node, x)
        fits = positions.shape == x.shape[:1] and positions.format == "i32"
        told = f"positions must be i32 {x.shape[:1]}, {positions.name} is {positions.format} {positions.shape}"
        self.require(fits, node, told)
        self.require(node.scale > 0 and node.span > 0, node, "scale and span must be above 0")
        return (self.output(node, 0, x.shape, format),)

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        x, positions = operands.inputs
        passed = (positions.long() + 1) // node.span
        return (x * (1 + node.scale * passed.to(x.dtype).log1p()).unsqueeze(1),)

    def domain(self) -> Domain:
        def case(label: str, point: Point) -> Case:
            made = self._case(label, point["m"], point["n"], point["first"], point["span"], point["scale"])
            return as_stored(like(point["values"], made, "x"), point["stored"])

        return Domain(
            case,
            {"span": (8192, 1, 7, 4096), "scale": (0.1, 0.35), "values": SPREADS, **STORED},
            {"m": ROWS, "n": COLUMNS, "first": Extent(0, 131_071, known=(8190,), counts=(1,))},
            work=lambda point: 2 * point["m"] * point["n"],
            holds=lambda point: fits_f16(point) and point["first"] + point["m"] <= CONTEXT.high,
        )

    def cases(self) -> Iterator[Case]:
        for m in ROW_COUNTS:
            for n in (576, 1536, 127) if m < 128 else (640,):
                yield self._case(f"m{m}-n{n}", m, n, first=m * 97, span=64)
        # Around the ends of spans, which a product with one over the span may miss.
        for span in (8192, 3, 7, 41, 61):
            yield self._case(f"span-{span}", 5, 200, first=3 * span - 3, span=span)
        yield self._case("start", 3, 200, first=0)
        yield self._case("far", 5, 200, first=131_071 - 5, span=1)
        yield self._case("one", 3, 200, first=77, span=1, scale=1.0)
        yield self._case("many", MANY_ROWS, 3, span=100)
        yield self._case("shuffled", 17, 200, span=50, shuffled=True)
        yield from at_extremes(lambda name: self._case(name, 3, 200, first=500, span=64), "x")

    def _case(
        self,
        label: str,
        m: int,
        n: int,
        first: int = 0,
        span: int = 8192,
        scale: float = 0.1,
        shuffled: bool = False,
    ) -> Case:
        """Positions from `first` on; `shuffled`: of several sequences, which neither start at 0 nor rise."""
        import torch

        def positions(generator: torch.Generator) -> torch.Tensor:
            order = torch.randperm(m, generator=generator) * 131 if shuffled else torch.arange(m)
            return (first + order).to(torch.int32)

        inputs = (Value("x", (m, n)), Value("positions", (m,), "i32"))
        return self.make_case(label, inputs, {"scale": scale, "span": span}, {"positions": positions})
