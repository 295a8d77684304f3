"""qkv: the three projections of attention, which read one input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kernelmux.formats import Value
from kernelmux.ops.fused import Fused, Part
from kernelmux.ops.op import ROW_COUNTS, Case, marks

if TYPE_CHECKING:
    from kernelmux.graph import TensorNode


class Qkv(Fused):
    """q = x Wqᵀ; k = x Wkᵀ; v = x Wvᵀ (each + its bias).

    Axes: m rows; n_q, n_k, n_v outputs; hidden_dim inputs.
    Inputs: x [m, hidden_dim]; three weights, of any formats; three biases or none.
    Outputs: q [m, n_q]; k [m, n_k]; v [m, n_v].
    Numerics: as mul_mat.
    """

    name = "qkv"
    inputs = ("x",)
    outputs = ("q", "k", "v")
    fields = ("weight",)
    optional = ("bias",)
    pattern = tuple(Part("mul_mat", ("x",), (port,), weight=index) for index, port in enumerate(("q", "k", "v")))

    def arguments(self, node: TensorNode) -> dict[str, Any]:
        m, hidden_dim = node.inputs[0].shape
        return {
            "m": m,
            "n": tuple(weight.extents[0] for weight in node.weight),
            "k": hidden_dim,
            "weight_formats": tuple(weight.format for weight in node.weight),
        }

    def cases(self) -> Iterator[Case]:
        k = 512
        for formats in (("f32",) * 3, ("Q4_1",) * 3, ("Q8_0",) * 3, ("Q4_K", "Q4_K", "Q6_K")):
            for m in ROW_COUNTS:
                weights = tuple(
                    Value(f"w{port}", (n, k), format)
                    for port, n, format in zip("qkv", (96, 32, 32), formats, strict=True)
                )
                name = f"qkv-{'-'.join(dict.fromkeys(formats))}-m{m}"
                yield Case(name, self.name, (Value("x", (m, k)),), {"weight": weights}, marks=marks(m))
