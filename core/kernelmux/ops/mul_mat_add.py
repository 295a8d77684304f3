"""mul_mat_add: a linear layer that adds its result to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kernelmux.formats import Value
from kernelmux.ops.fused import Fused, Part
from kernelmux.ops.op import ROW_COUNTS, Case, marks

if TYPE_CHECKING:
    from kernelmux.graph import TensorNode


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

    def arguments(self, node: TensorNode) -> dict[str, Any]:
        n, k = node.weight[0].extents
        return {"m": node.inputs[0].shape[0], "n": n, "k": k, "weight_format": node.weight[0].format}

    def cases(self) -> Iterator[Case]:
        for format in ("f32", "bf16", "Q4_0", "Q8_0"):
            for m in ROW_COUNTS:
                n, k = 576, 96
                inputs = (Value("x", (m, k)), Value("residual", (m, n)))
                fields = {"weight": (Value("weight", (n, k), format),)}
                yield Case(f"mul_mat_add-{format}-m{m}-n{n}-k{k}", self.name, inputs, fields, marks=marks(m))
