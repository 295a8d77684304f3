"""mul_mat: rows times a stored weight matrix, the op that reads almost every byte of a model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from kernelmux.graph.formats import BLOCK_WEIGHTS, SUPERBLOCK_WEIGHTS, Value, lookup
from kernelmux.graph.ops.axes import (
    INPUTS,
    OUTPUTS,
    ROWS,
    SPREADS,
    as_stored,
    block,
    on_blocks,
    whole_blocks,
)
from kernelmux.graph.ops.blocks import TinyBlocks
from kernelmux.graph.ops.cases import (
    COMMON_WEIGHTS,
    MANY_ROWS,
    PLAIN_WEIGHTS,
    ROW_COUNTS,
    Case,
    all_weights,
    at_extremes,
    like,
    linear_fields,
    loud,
)
from kernelmux.graph.ops.domain import Domain, Point
from kernelmux.graph.ops.op import Op, Operands, column_count, has_bias, row_count
from kernelmux.graph.ops.spreads import Draw

if TYPE_CHECKING:
    import torch

    from kernelmux.graph.graph import TensorNode


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
    told = {
        "m": row_count,
        "n": lambda node: node.weight[0].shape[0],
        "k": column_count,
        "weight_format": lambda node: node.weight[0].format,
        "bias": has_bias,
    }

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

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        (x,), (weight,) = operands.inputs, operands.weight
        y = x @ weight.T
        for bias in operands.bias:
            y = y + bias
        return (y,)

    def flops(self, node: TensorNode) -> int:
        n, k = node.weight[0].extents
        return 2 * node.inputs[0].extents[0] * n * k

    def domain(self) -> Domain:
        def case(label: str, point: Point) -> Case:
            m, n, format = point["m"], point["n"], point["format"]
            k = whole_blocks(point["k"], format)
            fields = linear_fields([""], [n], [format], k, point["bias"])
            draw: dict[str, Draw] = {"b": loud(n)}
            draw |= {"w": TinyBlocks(*fields["weight"])} if point["tiny"] else {}
            made = self.make_case(label, [Value("x", (m, k))], fields, draw)
            return as_stored(like(point["values"], made), point["stored"])

        return Domain(
            case,
            {
                "format": all_weights(),
                "values": SPREADS,
                "stored": ("f32", "bf16"),
                "bias": (False, True),
                "tiny": (False, True),
            },
            {"m": ROWS, "n": OUTPUTS, "k": INPUTS},
            product_work,
            lambda point: product_holds(point) and (not point["tiny"] or tiny_holds(point)),
            {"block": ("k", "format", block)},
        )

    def cases(self) -> Iterator[Case]:
        # Sizes of real models, and awkward ones: one output, one off a tile, a prime, two blocks; 56 superblocks in a
        # row, where others have 8 at most.
        sizes = [(m, 96, 256) for m in ROW_COUNTS]
        sizes += [(m, n, k) for n, k in ((576, 1536), (640, 2048), (31, 512), (257, 256)) for m in (1, 17)]
        sizes += [(1, 16, 14336), (5, 16, 14336), (64, 1, 256)]
        for format in all_weights():
            yield from (self._case(format, *size) for size in sizes)
            yield from (self._case(format, m, 48, 256, bias=True) for m in (1, 3))
            yield from self._extremes(format)
        for format in (*PLAIN_WEIGHTS, *BLOCK_WEIGHTS):
            for n, k in ((1536, 576), (192, 576), (2048, 640), (7, 32), (33, 96)):
                yield from (self._case(format, m, n, k) for m in (1, 5))
        for format in (*BLOCK_WEIGHTS, *SUPERBLOCK_WEIGHTS):
            yield self._tiny_scales(format)
        for format in PLAIN_WEIGHTS:
            yield from (self._case(format, 3, n, k) for n, k in ((3, 1), (13, 17), (64, 127)))
        # As many outputs as a small vocabulary has.
        yield from (self._case(format, 1, MANY_ROWS, 32) for format in ("f32", "Q4_0", "Q8_0"))
        # As many inputs as the widest models have, more outputs than 16 bits count, and many rows of a long sum.
        for format, k in (("f32", 29_568), ("bf16", 29_568), ("Q8_0", 29_568), ("Q4_K", 28_672)):
            yield self._case(format, 1, 32, k)
        for format in ("f32", "bf16", "Q8_0"):
            yield self._case(format, 2, 70_000, 32)
            yield self._case(format, 256, 32, 4096)
        yield from (self._case(format, 1, 4352, 256) for format in all_weights())
        # Few sums, long and of an odd length, with a bias: a library that divides them may add the parts less exactly.
        yield from (self._case(format, 7, 10, 2249, bias=True) for format in ("f32", "bf16", "f16"))
        large = [(m, n, k) for m in (1, 128, 512) for n, k in ((2048, 8192), (4096, 14336), (14336, 4096))]
        for format in COMMON_WEIGHTS:
            yield self._case(format, 17, 257, 256, bias=True)
            yield from (self._case(format, *size) for size in ((1031, 96, 256), (1, 4099, 256), (5, 4099, 256), *large))

    def _case(self, format: str, m: int, n: int, k: int, bias: bool = False) -> Case:
        label = f"{format}-m{m}-n{n}-k{k}{'-bias' if bias else ''}"
        fields = linear_fields([""], [n], [format], k, bias)
        return self.make_case(label, [Value("x", (m, k))], fields, {"b": loud(n)}, weights=n * k)

    def _tiny_scales(self, format: str) -> Case:
        fields = linear_fields([""], [32], [format], 512)
        draw = {"w": TinyBlocks(*fields["weight"])}
        return self.make_case(f"{format}-tiny-scales", [Value("x", (5, 512))], fields, draw)

    def _extremes(self, format: str) -> Iterator[Case]:
        fields, common = linear_fields([""], [64], [format], 256), format in COMMON_WEIGHTS
        make = partial(self.make_case, inputs=[Value("x", (3, 256))], fields=fields, smoke=common)
        return at_extremes(make, prefix=f"{format}-")


def product_work(point: Point, outputs: str = "n") -> int:
    """Of a product of m rows, n outputs and k inputs, up to whole blocks of the weight's format, or of several."""
    formats = (point["format"],) if isinstance(point["format"], str) else point["format"]
    m, n, k = point["m"], point[outputs], whole_blocks(point["k"], *formats)
    return int(n * k + m * (n + k) + m * n * k // 16)


def product_holds(point: Point) -> bool:
    """Whether inputs are as many as the weight's format stores, and sums too many for all of them to cancel.

    Of one input nothing cancels; of some the roundings are too few for their mean square to be what it is of many.
    """
    rows = 1 if point["values"] == "equal" else point["m"]  # Where rows are alike so are their sums.
    k = whole_blocks(point["k"], point["format"])
    return rows * point["n"] >= 32 and (k == 1 or rows * k >= 64) and on_blocks(point["k"], point["format"])


def tiny_holds(point: Point) -> bool:
    """Whether the weight's format has scales in float16, and the inputs leave something of them."""
    return point["format"] in (*BLOCK_WEIGHTS, *SUPERBLOCK_WEIGHTS) and point["values"] != "denormals"
