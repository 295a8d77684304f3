"""gate_up_swiglu: the first half of a llama feed-forward layer, from its input to the product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kernelmux.formats import Value
from kernelmux.ops.fused import Fused, Part
from kernelmux.ops.op import ROW_COUNTS, Case, marks

if TYPE_CHECKING:
    from kernelmux.graph import TensorNode


class GateUpSwiglu(Fused):
    """y = silu(x Wgᵀ) * (x Wuᵀ).

    Axes: m rows, n outputs, k inputs.
    Inputs: x [m, k]; two weights [n, k], of any formats; two biases or none.
    Outputs: y [m, n].
    Numerics: as mul_mat, silu and mul.
    """

    name = "gate_up_swiglu"
    inputs = ("x",)
    outputs = ("y",)
    fields = ("weight",)
    optional = ("bias",)
    pattern = (
        Part("mul_mat", ("x",), ("gate",), weight=0),
        Part("mul_mat", ("x",), ("up",), weight=1),
        Part("silu", ("gate",), ("gated",)),
        Part("mul", ("gated", "up"), ("y",)),
    )

    def arguments(self, node: TensorNode) -> dict[str, Any]:
        n, k = node.weight[0].extents
        return {
            "m": node.inputs[0].shape[0],
            "n": n,
            "k": k,
            "weight_formats": tuple(weight.format for weight in node.weight),
        }

    def cases(self) -> Iterator[Case]:
        n, k = 96, 512
        for formats in (("f32",) * 2, ("Q4_1",) * 2, ("Q8_0",) * 2, ("Q4_K", "Q5_K")):
            for m in ROW_COUNTS:
                weights = tuple(
                    Value(name, (n, k), format) for name, format in zip(("gate", "up"), formats, strict=True)
                )
                name = f"gate_up_swiglu-{'-'.join(dict.fromkeys(formats))}-m{m}"
                yield Case(name, self.name, (Value("x", (m, k)),), {"weight": weights}, marks=marks(m))
