"""qkv: the three projections of attention, which read one input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

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


def products(*ports: str) -> tuple[Part, ...]:
    """The pattern of as many mul_mats of one input."""
    return tuple(Part("mul_mat", ("x",), (port,), weight=index) for index, port in enumerate(ports))


class Qkv(Fused):
    """q = x Wqᵀ; k = x Wkᵀ; v = x Wvᵀ (each + its bias).

    Axes: m rows; n_q, n_k, n_v outputs; hidden_dim inputs.
    Inputs: x [m, hidden_dim]; three weights, of any formats; three biases or none.
    Outputs: q [m, n_q]; k [m, n_k]; v [m, n_v].
    Numerics: as mul_mat.
    """

    name = "qkv"
    inputs = ("x",)
    outputs: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    fields = ("weight",)
    optional = ("bias",)
    pattern = products("q", "k", "v")
    told = {
        "m": row_count,
        "n": lambda node: tuple(weight.shape[0] for weight in node.weight),
        "k": column_count,
        "weight_formats": weight_formats,
        "bias": has_bias,
    }

    widths: ClassVar[tuple[int, ...]] = (96, 32, 32)
    """Outputs of most cases; those of one small model are six times as many."""
    mixed: ClassVar[tuple[str, ...]] = ("Q4_K", "Q4_K", "Q6_K")

    def cases(self) -> Iterator[Case]:
        count = len(self.outputs)
        most = (*((format,) * count for format in ("f32", "Q4_1", "Q8_0")), self.mixed)
        for formats in most:
            for m in ROW_COUNTS:
                yield self._case(formats, m)
            for m in (1, 5):
                yield self._case(formats, m, bias=True)
        for format in all_weights():
            if (format,) * count not in most:
                yield self._case((format,) * count, 3)
        for format in ("f32", "Q4_0", "Q8_0"):
            for m in (1, 17):
                yield self._case((format,) * count, m, tuple(6 * n for n in self.widths), 576)
        yield self._case(("f32",) * count, 5, (512, 128, 128)[:count], 1000)
        for format in ("f32", "Q8_0"):
            for case in extreme_cases(self, (3, 512), self._fields((format,) * count, self.widths, 512, bias=False)):
                name = case.name.replace(f"{self.name}-", f"{self.name}-{format}-")
                yield replace(case, name=name, marks=marks(3))

    def _case(
        self, formats: Sequence[str], m: int, widths: Sequence[int] = (), k: int = 512, bias: bool = False
    ) -> Case:
        sizes = f"-n{widths[0]}-k{k}" if widths else ""
        name = f"{self.name}-{'-'.join(dict.fromkeys(formats))}-m{m}{sizes}{'-bias' if bias else ''}"
        widths = widths or self.widths
        draw = {f"b{port}": loud(n) for port, n in zip(self.outputs, widths, strict=True)}
        fields = self._fields(formats, widths, k, bias)
        return Case(name, self.name, (Value("x", (m, k)),), fields, draw, marks=marks(m))

    def _fields(self, formats: Sequence[str], widths: Sequence[int], k: int, bias: bool) -> dict[str, Any]:
        ports = tuple(zip(self.outputs, widths, formats, strict=True))
        weights = tuple(Value(f"w{port}", (n, k), format) for port, n, format in ports)
        return {"weight": weights, "bias": tuple(Value(f"b{port}", (n,)) for port, n, _ in ports) if bias else ()}
