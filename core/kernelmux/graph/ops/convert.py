"""convert: the same numbers, stored in another format. Plans insert it where neighbours differ."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from kernelmux.graph.formats import FORMATS, Value, lookup
from kernelmux.graph.ops.axes import ROWS, SPREADS, STORED_COLUMNS, block, on_blocks, whole_blocks
from kernelmux.graph.ops.cases import ROW_COUNTS, Case, at_extremes, like
from kernelmux.graph.ops.domain import Domain, Point
from kernelmux.graph.ops.op import Op, Operands, column_count, row_count
from kernelmux.graph.ops.spreads import AROUND_F16, Between, Draw

if TYPE_CHECKING:
    import torch

    from kernelmux.graph.graph import TensorNode


class Convert(Op):
    """y = x, stored in y's format.

    Axes: m rows, n columns.
    Inputs: x [m, n] in any format.
    Outputs: y [m, n] in any other.
    Constraints: n is a multiple of both formats' blocks.
    Numerics: each element rounded to nearest; a block's scale is the largest magnitude in it over the largest that the
    element type holds.
    """

    name = "convert"
    inputs = ("x",)
    outputs = ("y",)
    told = {
        "m": row_count,
        "n": column_count,
        "source": lambda node: node.inputs[0].format,
        "target": lambda node: node.outputs[0].format,
    }

    def infer(self, node: TensorNode, format: str) -> tuple[Value, ...]:
        (x,) = node.inputs
        self.require_rows(node, x)
        columns = x.shape[1]
        fault = lookup(format).check((columns,)) if isinstance(columns, int) else None
        self.require(fault is None, node, str(fault))
        return (self.output(node, 0, x.shape, format),)

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        return operands.inputs

    def flops(self, node: TensorNode) -> int:
        return 0

    def domain(self) -> Domain:
        def case(label: str, point: Point) -> Case:
            source, target = point["source"], point["target"]
            n = whole_blocks(point["n"], source, target)
            return like(point["values"], self._case(source, target, point["m"], n, label))

        def holds(point: Point) -> bool:
            both = point["source"], point["target"]
            if both[0] == both[1] or not on_blocks(point["n"], *both):
                return False
            plain = all(lookup(format).plain for format in both)
            # A block has no scale for what is no number; one scale for all is coarse for the small rows.
            if point["values"] == "nan-and-infinity":
                return plain
            return point["values"] != "uneven" or "fp8_tensor" not in both

        activations = tuple(name for name, format in FORMATS.items() if format.rounding)
        values = (*SPREADS, "f16-subnormals", "nan-and-infinity")
        return Domain(
            case,
            {"source": activations, "target": (*activations[1:], activations[0]), "values": values},
            {"m": ROWS, "n": STORED_COLUMNS},
            work=lambda point: 2 * point["m"] * point["n"],
            holds=holds,
            groups={"from blocks": ("n", "source", block), "to blocks": ("n", "target", block)},
        )

    def cases(self) -> Iterator[Case]:
        activations = [name for name, format in FORMATS.items() if format.rounding]
        for source, target in itertools.permutations(activations, 2):
            for m in ROW_COUNTS if "f32" in (source, target) else (1, 3, 17, 64):
                yield self._case(source, target, m, 256)
        for other in activations[1:]:
            for source, target in (("f32", other), (other, "f32")):
                yield self._case(source, target, 5, 14336)
                if lookup(other).block == 1:
                    yield self._case(source, target, 64, 33)
                    yield self._case(source, target, 3, 1)
        for target in activations[1:]:
            # A block of zeros must come out as zeros: its scale is 0, which nothing may be divided by.
            yield self._drawn("zero-blocks", target, _with_zero_blocks)
            for case in at_extremes(partial(self._drawn, target=target)):
                # One scale for all is coarse for the small rows: it is what that format means.
                if case.name != "convert-f32-fp8_tensor-uneven":
                    yield case
        # What only one of the formats of 16 bits holds, and what float16 holds in fewer.
        for target, (label, most) in itertools.product(("bf16", "f16"), AROUND_F16.items()):
            yield self._drawn(label, target, Between(-most, most, (3, 256)))
        for target in ("f32", "bf16"):
            yield like("f16-subnormals", self._case("f16", target, 3, 256, f"f16-{target}-subnormals"))
        # What only a scale for each row, or each block, gets right.
        yield self._drawn("uneven-rows", "fp8_row", _uneven_rows)
        yield self._drawn("uneven-rows", "fp8_block", _uneven_rows)
        yield self._drawn("uneven-blocks", "q8_32", _uneven_blocks)
        yield self._drawn("far-blocks", "fp8_block", _far_blocks)

    def _drawn(self, label: str, target: str, draw: Draw | None = None) -> Case:
        """[3, 256] of f32, drawn so."""
        drawn = {"x": draw} if draw else {}
        return self.make_case(f"f32-{target}-{label}", [Value("x", (3, 256))], draw=drawn, format=target, smoke=True)

    def _case(self, source: str, target: str, m: int, n: int, label: str = "") -> Case:
        label = label or f"{source}-{target}-m{m}-n{n}"
        return self.make_case(label, [Value("x", (m, n), source)], format=target)


def _with_zero_blocks(generator: torch.Generator) -> torch.Tensor:
    """[3, 256] of noise with the first 128 columns of row 0, and all of row 1, at zero."""
    import torch

    noise = torch.randn(3, 256, generator=generator)
    noise[0, :128] = 0
    noise[1] = 0
    return noise


def _uneven_rows(generator: torch.Generator) -> torch.Tensor:
    """[3, 256] of noise, each row a thousandth of the one before: e4m3 spans a factor of 2e5."""
    import torch

    return torch.randn(3, 256, generator=generator) * 10.0 ** (3 - 3 * torch.arange(3)).unsqueeze(1)


def _far_blocks(generator: torch.Generator) -> torch.Tensor:
    """[3, 256] of noise, the second block of 128 a millionth of the first: by one scale for both it is zeros."""
    import torch

    return torch.randn(3, 256, generator=generator) * 10.0 ** (3 - 6 * (torch.arange(256) // 128))


def _uneven_blocks(generator: torch.Generator) -> torch.Tensor:
    """[3, 256] whose even blocks of 32 hold one number, exact in 8 bits; by its scale the odd ones round to zeros."""
    import torch

    x = 0.3 + 0.19 * torch.rand(3, 256, generator=generator)
    x *= torch.randint(2, x.shape, generator=generator) * 2 - 1
    blocks = x.view(3, 4, 2, 32)
    blocks[:, :, 0] = 0
    blocks[:, :, 0, 7] = 127
    return x
