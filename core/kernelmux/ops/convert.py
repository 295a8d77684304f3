"""convert: the same numbers, stored in another format. Plans insert it where neighbours differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kernelmux.formats import FORMATS, Value, lookup
from kernelmux.ops.op import Case, Op, Operands, marks

if TYPE_CHECKING:
    import torch

    from kernelmux.graph import TensorNode


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

    def infer(self, node: TensorNode, format: str) -> tuple[Value, ...]:
        (x,) = node.inputs
        self.require_rows(node, x)
        columns = x.shape[1]
        fault = lookup(format).check((columns,)) if isinstance(columns, int) else None
        self.require(fault is None, node, str(fault))
        return (self.output(node, 0, x.shape, format),)

    def arguments(self, node: TensorNode) -> dict[str, Any]:
        m, n = node.inputs[0].shape
        return {"m": m, "n": n, "source": node.inputs[0].format, "target": node.outputs[0].format}

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        return operands.inputs

    def flops(self, node: TensorNode) -> int:
        return 0

    def cases(self) -> Iterator[Case]:
        activations = [name for name, format in FORMATS.items() if format.rounding]
        for source in activations:
            for target in activations:
                if source != target:
                    for m in (1, 3, 17, 64):
                        yield self._case(source, target, m, 256)
        for source, target in (("f32", "bf16"), ("bf16", "f32"), ("f32", "f16"), ("f32", "fp8_row")):
            yield self._case(source, target, 64, 33)
        for target in activations[1:]:
            # A block of zeros must come out as zeros: its scale is 0, which nothing may be divided by.
            draw = {"x": _with_zero_blocks}
            name = f"convert-f32-{target}-zero-blocks"
            yield Case(name, self.name, (Value("x", (3, 256)),), {}, draw, target, marks(1))

    def _case(self, source: str, target: str, m: int, n: int) -> Case:
        name = f"convert-{source}-{target}-m{m}-n{n}"
        return Case(name, self.name, (Value("x", (m, n), source),), format=target, marks=marks(m))


def _with_zero_blocks(generator: torch.Generator) -> torch.Tensor:
    """[3, 256] of noise with the first 128 columns of row 0, and all of row 1, at zero."""
    import torch

    noise = torch.randn(3, 256, generator=generator)
    noise[0, :128] = 0
    noise[1] = 0
    return noise
