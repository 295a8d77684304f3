"""route: which experts a row is given to, and with what weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.axes import ROWS, STORED, as_stored
from kernelmux.graph.ops.cases import MANY_ROWS, ROW_COUNTS, Case, like
from kernelmux.graph.ops.domain import Domain, Point
from kernelmux.graph.ops.op import Op, Operands, column_count, elements, own_fields, row_count
from kernelmux.graph.ops.spreads import Between

if TYPE_CHECKING:
    import torch

    from kernelmux.graph.graph import TensorNode

EXPERTS = ((8, 2), (1, 1), (16, 1), (32, 4), (60, 4), (64, 8), (128, 8), (256, 8), (512, 10))
"""Experts of a layer, and how many of them each row has: Mixtral, gpt-oss, Qwen's, OLMoE, DeepSeek's."""


class Route(Op):
    """ids = the top_k experts of the largest logits; weights = their softmax, or sigmoid, times scale.

    Axes: m rows, as many columns as experts; top_k experts a row.
    Inputs: logits [m, experts]; top_k; renormalize, whether the softmax is over the chosen alone, so that their weights
    add up to one, or over all experts; sigmoid, whether each chosen logit has its own instead; scale, 1 unless stated.
    Outputs: ids [m, top_k], i32, the largest logit's first and of equal ones the lower id; weights [m, top_k].
    Numerics: ids are exact, and in range whatever the logits are. Shazeer et al. 2017 (arXiv:1701.06538) and, of
    weights that are not renormalised, Fedus et al. 2021 (arXiv:2101.03961); Llama 4 has sigmoids.
    """

    name = "route"
    inputs = ("logits",)
    outputs = ("ids", "weights")
    fields = ("top_k",)
    optional = ("renormalize", "sigmoid", "scale")
    told = {"m": row_count, "experts": column_count, **own_fields("top_k", "renormalize", "sigmoid")}

    def infer(self, node: TensorNode, format: str) -> tuple[Value, ...]:
        (logits,) = node.inputs
        self.require_rows(node, logits)
        rows, experts = logits.shape
        fits = isinstance(experts, int) and 0 < node.top_k <= experts
        self.require(fits, node, f"{node.top_k} of {experts} experts cannot be chosen")
        both = node.renormalize and node.sigmoid
        self.require(not both, node, "weights are renormalised or sigmoids, not both")
        shape = (rows, node.top_k)
        return self.output(node, 0, shape, "i32"), self.output(node, 1, shape, format)

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        (logits,) = operands.inputs
        largest, ids = logits.sort(dim=-1, descending=True, stable=True)
        if node.sigmoid:
            return ids[:, : node.top_k].int(), (node.scale or 1.0) * largest[:, : node.top_k].sigmoid()
        # Less the largest before anything is added up: of large logits a logarithm of the sum keeps few digits.
        parts = (largest - largest[:, :1]).exp()
        chosen = parts[:, : node.top_k]
        total = (chosen if node.renormalize else parts).sum(dim=-1, keepdim=True)
        return ids[:, : node.top_k].int(), (node.scale or 1.0) * (chosen / total)

    def flops(self, node: TensorNode) -> int:
        return 4 * elements(node.inputs[0])

    def domain(self) -> Domain:
        def case(label: str, point: Point) -> Case:
            kind, scale = point["weights"], point["scale"]
            made = self._case(
                label, point["m"], point["experts"], kind == "renormalized", scale, sigmoid=kind == "sigmoid"
            )
            return as_stored(like(point["values"], made), point["stored"])

        return Domain(
            case,
            {
                "experts": EXPERTS,
                "weights": ("softmax", "renormalized", "sigmoid"),
                "scale": (0.0, 2.5),
                "values": ("noise", "equal", "uneven", "zeros", "zero-row", "large"),
                **STORED,
            },
            {"m": ROWS},
            work=lambda point: 2 * point["m"] * point["experts"][0],
        )

    def cases(self) -> Iterator[Case]:
        for m in ROW_COUNTS:
            for renormalize in (False, True):
                yield self._case(f"m{m}-{_kind(renormalize)}", m, renormalize=renormalize)
        for experts in EXPERTS:
            for renormalize in (False, True):
                label = f"{experts[1]}-of-{experts[0]}-{_kind(renormalize)}"
                yield self._case(label, 5, experts, renormalize)
        for experts in ((16, 1), (128, 1), (64, 8)):
            yield self._case(f"sigmoid-{experts[1]}-of-{experts[0]}", 5, experts, sigmoid=True)
        yield self._case("sigmoid-many", MANY_ROWS, (4, 1), sigmoid=True)
        yield self._case("sigmoid-scaled", 5, (64, 6), scale=2.5, sigmoid=True)
        for spread in ("uneven", "zeros", "large"):
            yield like(spread, self._case(f"sigmoid-{spread}", 3, (16, 1), sigmoid=True))
        yield self._case("scaled", 5, (64, 6), scale=16.0)
        yield self._case("all", 5, (7, 7), renormalize=True)
        yield self._case("many", MANY_ROWS, (4, 2))
        # Of few numbers, so that most are equal to another.
        yield self._case("ties", 17, (64, 8), draw={"logits": Between(-2, 2, (17, 64))})
        for spread in ("equal", "uneven", "zeros", "zero-row", "large"):
            yield like(spread, self._case(spread, 3, (128, 8)))

    def _case(
        self,
        label: str,
        m: int,
        experts: tuple[int, int] = (128, 8),
        renormalize: bool = False,
        scale: float = 0.0,
        draw: dict[str, Any] | None = None,
        sigmoid: bool = False,
    ) -> Case:
        """`experts`: how many there are, and are chosen."""
        count, top_k = experts
        fields = {"top_k": top_k, "renormalize": renormalize, "scale": scale, "sigmoid": sigmoid}
        return self.make_case(label, [Value("logits", (m, count))], fields, draw)


def _kind(renormalize: bool) -> str:
    return "renormalized" if renormalize else "softmax"
