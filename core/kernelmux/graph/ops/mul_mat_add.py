"""mul_mat_add: a linear layer that adds its result to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.fused import Fused, Part
from kernelmux.graph.ops.mul_mat import MulMat
from kernelmux.graph.ops.op import ROW_COUNTS, Case, all_weights, extremes, loud, marks


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

    def cases(self) -> Iterator[Case]:
        for format in ("f32", "bf16", "Q4_0", "Q8_0"):
            for m in ROW_COUNTS:
                yield self._case(format, m, 576, 96)
            for m in (1, 5):
                yield self._case(format, m, 576, 96, bias=True)
            for m in (1, 17):
                yield self._case(format, m, 576, 1536)
        for format in all_weights():
            yield self._case(format, 3, 96, 512, loudly=True)
        yield self._case("f32", 5, 257, 127)
        for label, spread in extremes().items():
            case = self._case("Q8_0", 3, 96, 512)
            draw = {value.name: partial(spread, shape=value.extents) for value in case.inputs}
            yield replace(case, name=f"mul_mat_add-Q8_0-{label}", draw=draw)

    def _case(self, format: str, m: int, n: int, k: int, bias: bool = False, loudly: bool = False) -> Case:
        """`loudly`: the residual is as large as the product, as it is in a model's later layers."""
        inputs = (Value("x", (m, k)), Value("residual", (m, n)))
        fields = {"weight": (Value("weight", (n, k), format),), "bias": (Value("bias", (n,)),) if bias else ()}
        draw = {"bias": loud(n), **({"residual": loud(n, m)} if loudly else {})}
        name = f"mul_mat_add-{format}-m{m}-n{n}-k{k}{'-bias' if bias else ''}{'-loud' if loudly else ''}"
        return Case(name, self.name, inputs, fields, draw, marks=marks(m))
