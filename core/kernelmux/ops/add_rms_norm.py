"""add_rms_norm: the residual connection and the norm after it, in one pass over the rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kernelmux.formats import Value
from kernelmux.ops.fused import Fused, Part
from kernelmux.ops.op import ROW_COUNTS, Case, marks

if TYPE_CHECKING:
    from kernelmux.graph import TensorNode


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

    def arguments(self, node: TensorNode) -> dict[str, Any]:
        m, hidden_dim = node.inputs[0].shape
        return {"m": m, "hidden_dim": hidden_dim, "epsilon": node.epsilon}

    def cases(self) -> Iterator[Case]:
        for m in ROW_COUNTS:
            for k in (576, 127):
                fields = {"gamma": (Value("gamma", (k,)),), "epsilon": 1e-5}
                inputs = (Value("a", (m, k)), Value("b", (m, k)))
                yield Case(f"add_rms_norm-m{m}-k{k}", self.name, inputs, fields, marks=marks(m))
