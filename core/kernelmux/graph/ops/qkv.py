"""qkv: the three projections of attention, which read one input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.axes import FUSED_INPUTS, OUTPUTS, ROWS, SPREADS, as_stored, block, whole_blocks
from kernelmux.graph.ops.cases import ROW_COUNTS, Case, all_weights, at_extremes, like, linear_fields, loud
from kernelmux.graph.ops.domain import Domain, Point
from kernelmux.graph.ops.fused import Fused, Part
from kernelmux.graph.ops.mul_mat import product_holds, product_work
from kernelmux.graph.ops.op import column_count, has_bias, row_count, weight_formats


def products(*ports: str) -> tuple[Part, ...]:
    """The pattern of as many mul_mats of one input."""
    return tuple(Part("mul_mat", ("x",), (port,), weight=index) for index, port in enumerate(ports))


class Products(Fused):
    """A fused op that begins with several products of one input, and what its cases are."""

    inputs = ("x",)
    fields = ("weight",)
    optional = ("bias",)
    told = {
        "m": row_count,
        "n": lambda node: tuple(weight.shape[0] for weight in node.weight),
        "k": column_count,
        "weight_formats": weight_formats,
        "bias": has_bias,
    }

    widths: ClassVar[tuple[int, ...]]
    """Outputs of most cases."""
    wide: ClassVar[tuple[int, ...]]
    """Those of a small model."""
    odd: ClassVar[tuple[int, ...]]
    """Those of 1000 inputs."""
    mixed: ClassVar[tuple[str, ...]]

    def domain(self) -> Domain:
        count = len(self.widths)

        def case(label: str, point: Point) -> Case:
            formats = point["format"]
            # Of heads that share keys and values, as the op's own widths are.
            widths = [max(1, point["n"] * width // self.widths[0]) for width in self.widths]
            k = whole_blocks(point["k"], *formats)
            made = self._labelled(label, formats, point["m"], widths, k, point["bias"])
            return as_stored(like(point["values"], made), point["stored"])

        def holds(point: Point) -> bool:
            least = max(1, point["n"] * min(self.widths) // self.widths[0])
            return all(product_holds({**point, "n": least, "format": format}) for format in point["format"])

        alike = [(format,) * count for format in all_weights()]
        return Domain(
            case,
            {"format": (*alike, self.mixed), "values": SPREADS, "stored": ("f32", "bf16"), "bias": (False, True)},
            {"m": ROWS, "n": replace(OUTPUTS, plain=32 * self.widths[0] // min(self.widths)), "k": FUSED_INPUTS},
            lambda point: product_work(point) * count,
            holds,
            {"block": ("k", "format", lambda formats: block(formats[0]))},
        )

    def cases(self) -> Iterator[Case]:
        count = len(self.widths)
        most = (*((format,) * count for format in ("f32", "Q4_1", "Q8_0")), self.mixed)
        for formats in most:
            yield from (self._case(formats, m) for m in ROW_COUNTS)
            yield from (self._case(formats, m, bias=True) for m in (1, 5))
        alike = [(format,) * count for format in all_weights()]
        yield from (self._case(formats, 3) for formats in alike if formats not in most)
        for format in ("f32", "Q4_0", "Q8_0"):
            yield from (self._case((format,) * count, m, self.wide, 576) for m in (1, 17))
        yield self._case(("f32",) * count, 5, self.odd, 1000)
        for format in ("f32", "Q8_0"):
            make = partial(self._labelled, formats=(format,) * count, m=3)
            yield from at_extremes(make, prefix=f"{format}-")

    def _case(
        self, formats: Sequence[str], m: int, widths: Sequence[int] = (), k: int = 512, bias: bool = False
    ) -> Case:
        sizes = f"-n{widths[0]}-k{k}" if widths else ""
        label = f"{'-'.join(dict.fromkeys(formats))}-m{m}{sizes}{'-bias' if bias else ''}"
        return self._labelled(label, formats, m, widths or self.widths, k, bias)

    def _labelled(
        self, label: str, formats: Sequence[str], m: int, widths: Sequence[int] = (), k: int = 512, bias: bool = False
    ) -> Case:
        widths = widths or self.widths
        ports = [part.outputs[0] for part in self.pattern if part.op == "mul_mat"]
        draw = {f"b{port}": loud(n) for port, n in zip(ports, widths, strict=True)}
        return self.make_case(label, [Value("x", (m, k))], linear_fields(ports, widths, formats, k, bias), draw)


class Qkv(Products):
    """q = x Wqᵀ; k = x Wkᵀ; v = x Wvᵀ (each + its bias).

    Axes: m rows; n_q, n_k, n_v outputs; hidden_dim inputs.
    Inputs: x [m, hidden_dim]; three weights, of any formats; three biases or none.
    Outputs: q [m, n_q]; k [m, n_k]; v [m, n_v].
    Numerics: as mul_mat.
    """

    name = "qkv"
    outputs = ("q", "k", "v")
    pattern = products(*outputs)
    widths = (96, 32, 32)
    wide = (576, 192, 192)
    odd = (512, 128, 128)
    mixed = ("Q4_K", "Q4_K", "Q6_K")
