"""mul_mat_add: a linear layer that adds its result to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.axes import FUSED_INPUTS, OUTPUTS, ROWS, SPREADS, as_stored, block, whole_blocks
from kernelmux.graph.ops.cases import ROW_COUNTS, Case, all_weights, at_extremes, like, linear_fields, loud
from kernelmux.graph.ops.domain import Domain, Point
from kernelmux.graph.ops.fused import Fused, Part
from kernelmux.graph.ops.mul_mat import MulMat, product_holds, product_work


class MulMatAdd(Fused):
    """y = residual + x Wᵀ (+ b).

    Axes: m rows, n outputs, k inputs.
    Inputs: x [m, k]; residual [m, n]; weight [n, k]; bias [n], optional.
    Outputs: y [m, n]; may be residual's memory.
    Numerics: as mul_mat and add.
    """

    name = "mul_mat_add"
    inputs = ("x", "residual")
    outputs = ("y",)
    fields = ("weight",)
    optional = ("bias",)
    in_place = ((1, 0),)
    pattern = (Part("mul_mat", ("x",), ("product",), weight=0), Part("add", ("residual", "product"), ("y",)))
    told = MulMat.told

    def domain(self) -> Domain:
        def case(label: str, point: Point) -> Case:
            k = whole_blocks(point["k"], point["format"])
            sizes = (point["m"], point["n"], k)
            made = self._case(label, point["format"], *sizes, point["bias"], point["loudly"])
            return as_stored(like(point["values"], made, "x"), point["stored"])

        switches = {"bias": (False, True), "loudly": (False, True)}
        return Domain(
            case,
            {"format": all_weights(), "values": SPREADS, "stored": ("f32", "bf16"), **switches},
            {"m": ROWS, "n": OUTPUTS, "k": FUSED_INPUTS},
            product_work,
            product_holds,
            {"block": ("k", "format", block)},
        )

    def cases(self) -> Iterator[Case]:
        for format in ("f32", "bf16", "Q4_0", "Q8_0"):
            for m, k in (*((m, 96) for m in ROW_COUNTS), (1, 1536), (17, 1536)):
                yield self._case(f"{format}-m{m}-n576-k{k}", format, m, 576, k)
            for m in (1, 5):
                yield self._case(f"{format}-m{m}-n576-k96-bias", format, m, 576, 96, bias=True)
        for format in all_weights():
            yield self._case(f"{format}-m3-n96-k512-loud", format, 3, 96, 512, loudly=True)
        yield self._case("f32-m5-n257-k127", "f32", 5, 257, 127)
        yield from at_extremes(partial(self._case, format="Q8_0", m=3, n=96, k=512), prefix="Q8_0-")

    def _case(self, label: str, format: str, m: int, n: int, k: int, bias: bool = False, loudly: bool = False) -> Case:
        """`loudly`: the residual is as large as the product, as it is in a model's later layers."""
        inputs = (Value("x", (m, k)), Value("residual", (m, n)))
        draw = {"b": loud(n), **({"residual": loud(n, m)} if loudly else {})}
        return self.make_case(label, inputs, linear_fields([""], [n], [format], k, bias), draw)
