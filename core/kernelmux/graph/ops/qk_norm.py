"""qk_norm: each head of queries and keys scaled to unit root mean square, then by its gamma."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.axes import HEAD_DIMS, HEADS, ROWS, SPREADS, STORED, as_stored, fits_f16
from kernelmux.graph.ops.cases import MANY_ROWS, ROW_COUNTS, Case, at_extremes, like
from kernelmux.graph.ops.domain import Domain, Point
from kernelmux.graph.ops.op import Op, Operands, own_fields, row_count

if TYPE_CHECKING:
    import torch

    from kernelmux.graph.graph import TensorNode


class QkNorm(Op):
    """y = gamma * x / sqrt(mean(x²) + epsilon), head by head, of queries and of keys.

    Axes: m rows; num_heads query heads, num_kv_heads key heads, head_dim.
    Inputs: q [m, num_heads * head_dim]; k [m, num_kv_heads * head_dim]; gamma, two [head_dim]: the queries' and the
    keys'; epsilon > 0.
    Outputs: q, k, normed; each may be its input's memory.
    Numerics: as rms_norm; Dehghani et al. 2023 (arXiv:2302.05442) norm queries and keys so that scores stay bounded.
    """

    name = "qk_norm"
    inputs = ("q", "k")
    outputs = ("q", "k")
    fields = ("gamma", "epsilon", "num_heads", "num_kv_heads", "head_dim")
    in_place = ((0, 0), (1, 1))
    told = {"m": row_count, **own_fields("num_heads", "num_kv_heads", "head_dim", "epsilon")}

    def infer(self, node: TensorNode, format: str) -> tuple[Value, ...]:
        q, k = node.inputs
        self.require_rows(node, q, k)
        self.require_heads(node, q, node.num_heads)
        self.require_heads(node, k, node.num_kv_heads)
        self.require(len(node.gamma) == 2, node, f"two gammas are needed, {len(node.gamma)} were given")
        for gamma in node.gamma:
            fits = gamma.shape == (node.head_dim,)
            self.require(fits, node, f"{gamma.name} is {gamma.shape}, heads have {node.head_dim}")
        self.require(node.epsilon > 0, node, f"epsilon must be above 0, not {node.epsilon}")
        return tuple(self.output(node, i, rows.shape, format) for i, rows in enumerate((q, k)))

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        return tuple(_normed(rows, gamma, node) for rows, gamma in zip(operands.inputs, operands.gamma, strict=True))

    def flops(self, node: TensorNode) -> int:
        return 4 * super().flops(node)

    def domain(self) -> Domain:
        def case(label: str, point: Point) -> Case:
            heads, kv_heads = point["heads"]
            made = self._case(label, point["m"], heads, kv_heads, point["dim"], point["epsilon"])
            return as_stored(like(point["values"], made, "q", "k"), point["stored"])

        values = (*(spread for spread in SPREADS if spread != "outliers"), "small", "large")
        return Domain(
            case,
            {"heads": HEADS, "dim": HEAD_DIMS, "epsilon": (1e-5, 1e-6), "values": values, **STORED},
            {"m": ROWS},
            work=lambda point: 2 * point["m"] * sum(point["heads"]) * point["dim"],
            holds=fits_f16,
        )

    def cases(self) -> Iterator[Case]:
        for m in ROW_COUNTS:
            yield self._case(f"m{m}", m)
        for heads, kv_heads, dim in ((32, 8, 128), (28, 4, 128), (8, 1, 96), (4, 2, 80), (4, 1, 256), (1, 1, 64)):
            for m in (1, 5):
                yield self._case(f"h{heads}-kv{kv_heads}-d{dim}-m{m}", m, heads, kv_heads, dim)
        yield self._case("m257-h32-kv8-d128", 257, 32, 8, 128)
        yield self._case("odd", 5, 3, 1, 33)
        yield self._case("many", MANY_ROWS, 1, 1, 2)
        # Tiny rows, where epsilon decides the answer.
        yield self._case("tiny", 4, scale=1e-3)
        yield self._case("huge", 2, epsilon=1e-6, scale=1e4)
        yield from at_extremes(partial(self._case, m=3), "q", "k")

    def _case(
        self,
        label: str,
        m: int,
        heads: int = 9,
        kv_heads: int = 3,
        dim: int = 64,
        epsilon: float = 1e-5,
        scale: float = 1.0,
    ) -> Case:
        import torch

        widths = {"q": heads * dim, "k": kv_heads * dim}
        fields: dict[str, Any] = {"gamma": tuple(Value(f"{port}_gamma", (dim,)) for port in widths)}
        fields |= {"epsilon": epsilon, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}
        made = self.make_case(label, [Value(port, (m, width)) for port, width in widths.items()], fields)
        if scale == 1:
            return made
        # Functions of a loop's variable would all have its last.
        drawn = {port: partial(_noise, torch.Size((m, width)), scale) for port, width in widths.items()}
        return replace(made, draw=drawn)


def _noise(shape: torch.Size, scale: float, generator: torch.Generator) -> torch.Tensor:
    import torch

    return torch.randn(shape, generator=generator) * scale


def _normed(rows: torch.Tensor, gamma: torch.Tensor, node: TensorNode) -> torch.Tensor:
    heads = rows.reshape(len(rows), -1, node.head_dim)
    mean = heads.pow(2).mean(dim=-1, keepdim=True)
    return (gamma * heads * (mean + node.epsilon).rsqrt()).reshape(rows.shape)
