"""mul_mat: rows times a stored weight matrix, the op that reads almost every byte of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kernelmux.formats import Value, lookup
from kernelmux.ops.op import ROW_COUNTS, Case, Op, Operands

if TYPE_CHECKING:
    import torch

    from kernelmux.graph import TensorNode


class MulMat(Op):
    """y = x Wᵀ + b.

    Axes: m rows, n outputs, k inputs.
    Inputs: x [m, k]; weight W [n, k] in any format; bias b [n], optional.
    Outputs: y [m, n].
    Constraints: k is a multiple of the weight format's block.
    Numerics: the weight's exact dequantised values, summed without rounding; a kernel states its bound (NMSE).
    """

    name = "mul_mat"
    inputs = ("x",)
    outputs = ("y",)
    fields = ("weight",)
    optional = ("bias",)

    def infer(self, node: TensorNode, format: str) -> tuple[Value, ...]:
        (x,) = node.inputs
        self.require(len(node.weight) == 1, node, f"one weight is needed, {len(node.weight)} were given")
        (weight,) = node.weight
        self.require_rows(node, x)
        self.require(
            len(weight.shape) == 2 and weight.shape[1] == x.shape[1],
            node,
            f"weight {weight.name} is {weight.shape}, x {x.name} is {x.shape}: the last axes must be equal",
        )
        fault = lookup(weight.format).check(weight.extents)
        self.require(fault is None, node, f"weight {weight.name}: {fault}")
        for bias in node.bias:
            self.require(bias.shape == weight.shape[:1], node, f"bias {bias.name} is {bias.shape}, not [n]")
        return (self.output(node, 0, (x.shape[0], weight.shape[0]), format),)

    def arguments(self, node: TensorNode) -> dict[str, Any]:
        n, k = node.weight[0].extents
        return {"m": node.inputs[0].shape[0], "n": n, "k": k, "weight_format": node.weight[0].format}

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        (x,), (weight,) = operands.inputs, operands.weight
        y = x @ weight.T
        for bias in operands.bias:
            y = y + bias
        return (y,)

    def flops(self, node: TensorNode) -> int:
        n, k = node.weight[0].extents
        return 2 * node.inputs[0].extents[0] * n * k

    def cases(self) -> Iterator[Case]:
        for format in ("f32", "f16", "bf16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
            for m in ROW_COUNTS:
                for n, k in ((576, 576), (64, 1536), (31, 96)):
                    yield self._case(format, m, n, k)
            yield self._case(format, 3, 48, 64, bias=True)
        for format in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
            for m in (1, 5):
                yield self._case(format, m, 40, 512)

    def _case(self, format: str, m: int, n: int, k: int, bias: bool = False) -> Case:
        fields = {"weight": (Value("weight", (n, k), format),)}
        if bias:
            fields["bias"] = (Value("bias", (n,)),)
        name = f"mul_mat-{format}-m{m}-n{n}-k{k}{'-bias' if bias else ''}"
        return Case(name, self.name, (Value("x", (m, k)),), fields)
