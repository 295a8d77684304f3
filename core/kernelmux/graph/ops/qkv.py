"""qkv: the three projections of attention, which read one input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.fused import Fused, Part
from kernelmux.graph.ops.op import ROW_COUNTS, WEIGHTS, Case, extreme_cases, loud, marks

if TYPE_CHECKING:
    from kernelmux.graph.graph import TensorNode


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
        most = (("f32",) * 3, ("Q4_1",) * 3, ("Q8_0",) * 3, ("Q4_K", "Q4_K", "Q6_K"))
        for formats in most:
            for m in ROW_COUNTS:
                yield self._case(formats, m)
            for m in (1, 5):
                yield self._case(formats, m, bias=True)
        for format in WEIGHTS:
            if (format,) * 3 not in most:
                yield self._case((format,) * 3, 3)
        for format in ("f32", "Q4_0", "Q8_0"):
            for m in (1, 17):
                yield self._case((format,) * 3, m, (576, 192, 192), 576)
        yield self._case(("f32",) * 3, 5, (512, 128, 128), 1000)
        for format in ("f32", "Q8_0"):
            for case in extreme_cases(self, (3, 512), self._fields((format,) * 3, (96, 32, 32), 512, bias=False)):
                yield replace(case, name=case.name.replace("qkv-", f"qkv-{format}-"), marks=marks(3))

    def _case(
        self,
        formats: Sequence[str],
        m: int,
        widths: tuple[int, int, int] = (96, 32, 32),
        k: int = 512,
        bias: bool = False,
    ) -> Case:
        sizes = "" if (widths, k) == ((96, 32, 32), 512) else f"-n{widths[0]}-k{k}"
        name = f"qkv-{'-'.join(dict.fromkeys(formats))}-m{m}{sizes}{'-bias' if bias else ''}"
        draw = {f"b{port}": loud(n) for port, n in zip("qkv", widths, strict=True)}
        fields = self._fields(formats, widths, k, bias)
        return Case(name, self.name, (Value("x", (m, k)),), fields, draw, marks=marks(m))

    def _fields(self, formats: Sequence[str], widths: Sequence[int], k: int, bias: bool) -> dict[str, Any]:
        ports = tuple(zip("qkv", widths, formats, strict=True))
        weights = tuple(Value(f"w{port}", (n, k), format) for port, n, format in ports)
        return {"weight": weights, "bias": tuple(Value(f"b{port}", (n,)) for port, n, _ in ports) if bias else ()}
