"""mul_mat_id: rows times the matrices of the experts that each was given to."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from kernelmux.graph.formats import Value, lookup
from kernelmux.graph.ops.axes import SPREADS, as_stored, block, whole_blocks
from kernelmux.graph.ops.cases import (
    COMMON_WEIGHTS,
    PLAIN_WEIGHTS,
    ROW_COUNTS,
    Case,
    all_weights,
    at_extremes,
    like,
    loud,
)
from kernelmux.graph.ops.domain import Domain, Extent, Point
from kernelmux.graph.ops.mul_mat import product_holds
from kernelmux.graph.ops.op import Op, Operands, has_bias, own_fields, row_count
from kernelmux.graph.ops.spreads import Draw, Listed

if TYPE_CHECKING:
    import torch

    from kernelmux.graph.graph import TensorNode

CHOSEN = ((4, 2), (1, 1), (3, 3), (16, 1), (9, 8))
"""Experts, and how many of them each row has; few, for each is drawn."""


class MulMatId(Op):
    """y[i, j] = x[i, j] W[ids[i, j]]ᵀ + b[ids[i, j]], side by side for each j.

    Axes: m rows, each given to top_k of `experts` experts; n outputs, k inputs.
    Inputs: x [m, k], one row for all of its experts, or [m, top_k * k], one for each; ids [m, top_k], i32, each an
    expert; weight W [experts * n, k] in any format, one expert's rows after another's; bias b [experts * n], optional.
    Outputs: y [m, top_k * n].
    Constraints: k is a multiple of the weight format's block, n of the rows that its scales share.
    Numerics: as mul_mat. llama.cpp's op of this name.
    """

    name = "mul_mat_id"
    inputs = ("x", "ids")
    outputs = ("y",)
    fields = ("weight", "experts")
    optional = ("bias",)
    told = {
        "m": row_count,
        "n": lambda node: outputs_of(node),
        "k": lambda node: node.weight[0].shape[1],
        "top_k": lambda node: node.inputs[1].shape[1],
        "weight_format": lambda node: node.weight[0].format,
        "bias": has_bias,
        **own_fields("experts"),
    }

    def infer(self, node: TensorNode, format: str) -> tuple[Value, ...]:
        x, ids = node.inputs
        self.require(len(node.weight) == 1, node, f"one weight is needed, {len(node.weight)} were given")
        (weight,) = node.weight
        self.require_rows(node, x, ids)
        self.require(ids.format == "i32", node, f"{ids.name} is {ids.format}; ids are i32")
        fits = len(weight.shape) == 2 and weight.extents[0] % node.experts == 0
        self.require(fits, node, f"weight {weight.name} is {weight.shape}, not {node.experts} matrices over another")
        (n, k), top_k = (outputs_of(node), weight.extents[1]), ids.shape[1]
        assert isinstance(top_k, int)
        self.require(
            x.shape[1] in (k, top_k * k),
            node,
            f"weight {weight.name} is {weight.shape}, x {x.name} is {x.shape}: {k} or {top_k * k} columns are needed",
        )
        stored = lookup(weight.format)
        fault = stored.check(weight.extents)
        self.require(fault is None, node, f"weight {weight.name}: {fault}")
        tall = max(plane.rows for plane in stored.planes)
        self.require(n % max(tall, 1) == 0, node, f"weight {weight.name}: {tall} rows share a scale, experts have {n}")
        for bias in node.bias:
            self.require(bias.shape == weight.shape[:1], node, f"bias {bias.name} is {bias.shape}, not [experts * n]")
        return (self.output(node, 0, (x.shape[0], top_k * n), format),)

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        (x, ids), (weight,) = operands.inputs, operands.weight
        m, top_k = ids.shape
        n = len(weight) // node.experts
        rows = x.reshape(m, -1, weight.shape[1]).expand(m, top_k, -1).reshape(m * top_k, -1)
        experts = ids.reshape(-1).long()
        y = x.new_empty(m * top_k, n)
        for expert in sorted(set(experts.tolist())):
            own, part = (experts == expert).nonzero()[:, 0], slice(expert * n, (expert + 1) * n)
            y[own] = rows[own] @ weight[part].T
            for bias in operands.bias:
                y[own] += bias[part]
        return (y.reshape(m, top_k * n),)

    def flops(self, node: TensorNode) -> int:
        return 2 * node.outputs[0].extents[0] * node.outputs[0].extents[1] * node.weight[0].extents[1]

    def ids_below(self, node: TensorNode) -> int:
        return node.experts

    def unread(self, node: TensorNode) -> int:
        m, top_k = node.inputs[1].extents
        idle = node.experts - min(node.experts, m * top_k)
        return idle * sum(value.nbytes for value in node.weights) // node.experts

    def domain(self) -> Domain:
        def case(label: str, point: Point) -> Case:
            format = point["format"]
            n, k = self._fitting(point["n"], format), whole_blocks(point["k"], format)
            made = self._case(label, format, point["m"], n, k, point["experts"], point["own"], point["bias"])
            return as_stored(like(point["values"], made, "x"), point["stored"])

        def work(point: Point) -> int:
            (experts, top_k), format = point["experts"], point["format"]
            n, k = self._fitting(point["n"], format), whole_blocks(point["k"], format)
            return int(experts * n * k + point["m"] * top_k * (n + k) + point["m"] * top_k * n * k // 16)

        return Domain(
            case,
            {
                "format": all_weights(),
                "experts": CHOSEN,
                "values": SPREADS,
                "stored": ("f32", "bf16"),
                "own": (False, True),
                "bias": (False, True),
            },
            {
                "m": Extent(1, 256, known=(48, 200), counts=(1,)),
                "n": Extent(1, 1024, known=(768,), counts=(1,), plain=32),
                "k": Extent(1, 2048, known=(768,), counts=(1,)),
            },
            work,
            product_holds,
            {"block": ("k", "format", block)},
        )

    def cases(self) -> Iterator[Case]:
        for format in all_weights():
            for m in (1, 2, 5, 17, 64):
                yield self._case(f"{format}-m{m}", format, m)
            yield self._case(f"{format}-own-m3", format, 3, own=True)
            yield from (self._case(f"{format}-bias-m{m}", format, m, bias=True) for m in (3, 9))
            yield from at_extremes(partial(self._case, format=format, m=3), "x", prefix=f"{format}-")
        for format in COMMON_WEIGHTS:
            # One expert has all rows, and others none.
            yield self._case(f"{format}-one-m33", format, 33, experts=(8, 1), ids=[[5]] * 33)
            yield self._case(f"{format}-m200", format, 200, experts=(8, 2))
            yield self._case(f"{format}-many-m9", format, 9, 128, 256, (60, 8))
            yield self._case(f"{format}-large", format, 1, 768, 2048, (128, 8))
        for m in ROW_COUNTS:
            yield self._case(f"rows-m{m}", "f32", m, 32, 64, (4, 2))
        # More experts than a byte counts with its sign, and longer and wider matrices than the others'.
        for format in ("bf16", "Q8_0"):
            for m in (1, 9):
                yield self._case(f"{format}-of-256-m{m}", format, m, 32, 64, (256, 8))
                yield self._case(f"{format}-long-m{m}", format, m, 32, 4096, (8, 2))
                yield self._case(f"{format}-wide-m{m}", format, m, 1536, 64, (8, 2))
        for format in PLAIN_WEIGHTS:
            yield self._case(f"{format}-odd", format, 5, 33, 65, (5, 3))
            yield self._case(f"{format}-odd-own", format, 5, 33, 65, (5, 3), own=True)

    @staticmethod
    def _fitting(n: int, format: str) -> int:
        """`n`, up to whole blocks of rows."""
        tall = max(1, *(plane.rows for plane in lookup(format).planes))
        return -(-n // tall) * tall

    def _case(
        self,
        label: str,
        format: str,
        m: int,
        n: int = 128,
        k: int = 256,
        experts: tuple[int, int] = (6, 2),
        own: bool = False,
        bias: bool = False,
        ids: list[list[int]] | None = None,
    ) -> Case:
        """`experts`: how many there are, and each row has; `own`: a row of x for each; `ids`: drawn unless given."""
        count, top_k = experts
        source = random.Random(m)
        drawn = ids or [source.sample(range(count), top_k) for _ in range(m)]
        fields: dict[str, Any] = {"weight": (Value("w", (count * n, k), format),), "experts": count}
        fields["bias"] = (Value("b", (count * n,)),) if bias else ()
        draw: dict[str, Draw] = {"ids": Listed(drawn), "b": loud(count * n)}
        x = Value("x", (m, top_k * k if own else k))
        return self.make_case(label, [x, Value("ids", (m, top_k), "i32")], fields, draw, weights=count * n * k)


def outputs_of(node: TensorNode) -> int:
    """Outputs of each expert."""
    return node.weight[0].extents[0] // node.experts
