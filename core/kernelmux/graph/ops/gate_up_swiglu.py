"""gate_up_swiglu: the first half of a llama feed-forward layer, from its input to the product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.fused import Fused, Part
from kernelmux.graph.ops.op import (
    ROW_COUNTS,
    Case,
    all_weights,
    column_count,
    extreme_cases,
    has_bias,
    loud,
    marks,
    row_count,
    weight_formats,
)


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
    told = {
        "m": row_count,
        "n": lambda node: node.weight[0].shape[0],
        "k": column_count,
        "weight_formats": weight_formats,
        "bias": has_bias,
    }

    def cases(self) -> Iterator[Case]:
        most = (("f32",) * 2, ("Q4_1",) * 2, ("Q8_0",) * 2, ("Q4_K", "Q5_K"))
        for formats in most:
            for m in ROW_COUNTS:
                yield self._case(formats, m)
            for m in (1, 5):
                yield self._case(formats, m, bias=True)
        for format in all_weights():
            if (format,) * 2 not in most:
                yield self._case((format,) * 2, 3)
        for format in ("f32", "Q4_0", "Q8_0"):
            for m in (1, 17):
                yield self._case((format,) * 2, m, 1536, 576)
        yield self._case(("f32",) * 2, 5, 257, 1000)
        for format in ("f32", "Q8_0"):
            for case in extreme_cases(self, (3, 512), self._fields((format,) * 2, 96, 512, bias=False)):
                yield replace(case, name=case.name.replace("swiglu-", f"swiglu-{format}-"), marks=marks(3))

    def _case(self, formats: Sequence[str], m: int, n: int = 96, k: int = 512, bias: bool = False) -> Case:
        sizes = "" if (n, k) == (96, 512) else f"-n{n}-k{k}"
        name = f"gate_up_swiglu-{'-'.join(dict.fromkeys(formats))}-m{m}{sizes}{'-bias' if bias else ''}"
        draw = {"gate_bias": loud(n), "up_bias": loud(n)}
        fields = self._fields(formats, n, k, bias)
        return Case(name, self.name, (Value("x", (m, k)),), fields, draw, marks=marks(m))

    def _fields(self, formats: Sequence[str], n: int, k: int, bias: bool) -> dict[str, Any]:
        ports = ("gate", "up")
        weights = tuple(Value(port, (n, k), format) for port, format in zip(ports, formats, strict=True))
        return {"weight": weights, "bias": tuple(Value(f"{port}_bias", (n,)) for port in ports) if bias else ()}
