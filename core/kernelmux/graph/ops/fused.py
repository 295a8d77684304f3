"""What a fused op is: a pattern of plain ops that it equals. Shapes, numbers and flops follow from the pattern.

Enters: a pattern. Leaves: an Op like any other, which `rewrite.py` puts where the pattern stands. A backend may bring
its own (`new_ops` in hookspecs.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.op import Op, Operands

if TYPE_CHECKING:
    import torch

    from kernelmux.graph.graph import TensorNode


DRAWS = 20
"""Of noise, of which the mean counts: where one element is most of the whole, a few say little."""


@dataclass(frozen=True)
class Part:
    """One plain op of a pattern, wired by port names; `weight` says which of the node's weights is its.

    The fused node's other fields go to each part whose op takes them.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight: int | None = None


class Fused(Op):
    """An op that equals a chain of plain ones, in walking order. A port that is no output stays inside."""

    pattern: ClassVar[tuple[Part, ...]]

    def plain(self, node: TensorNode) -> tuple[TensorNode, ...]:
        """The plain nodes that a fused node equals, each named `node.port` after its first output."""
        return _plain(self, node)

    def infer(self, node: TensorNode, format: str) -> tuple[Value, ...]:
        # Every mul_mat has a weight, and all have a bias or none; what else a part reads by index may be left out.
        linear = sum(part.op == "mul_mat" for part in self.pattern)
        most = max((part.weight + 1 for part in self.pattern if part.weight is not None), default=0)
        fits = linear <= len(node.weight) <= most
        self.require(fits, node, f"{linear} to {most} weights are needed, {len(node.weight)} were given")
        self.require(len(node.bias) in (0, linear), node, f"{linear} biases or none, {len(node.bias)} were given")
        values: dict[str, Value] = {}
        for part, plain in zip(self.pattern, self.plain(dataclasses.replace(node, outputs=())), strict=True):
            values.update(zip(part.outputs, plain.outputs, strict=True))
        # An output that updates an input keeps its format; the others are open.
        kept = {target for _, target in self.updates}
        return tuple(
            self.output(node, index, values[port].shape, values[port].format if index in kept else format)
            for index, port in enumerate(self.outputs)
        )

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        return self._walked(node, operands)

    def amplified(self, node: TensorNode, operands: Operands, nmse: float) -> tuple[float, ...]:
        """The NMSE of each output where every product inside is off by noise of `nmse` of its row's mean square.

        Gate times up has the error of both, and where they cancel or few elements are large, many times as much. The
        mean of `DRAWS`, of a fixed seed.
        """
        import torch

        generator = torch.Generator().manual_seed(0)

        def noisy(product: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(product.shape, generator=generator, dtype=torch.double).to(product.device)
            rows = product.square().mean(dim=-1, keepdim=True).sqrt()
            return product + noise * math.sqrt(nmse) * torch.maximum(rows, product.abs())

        truth, means = self._walked(node, operands), [0.0] * len(self.outputs)
        for _ in range(DRAWS):
            for index, (found, wanted) in enumerate(zip(self._walked(node, operands, noisy), truth, strict=True)):
                squared = float(wanted.square().sum())
                off = float((found - wanted).square().sum()) / squared if squared else 0.0
                means[index] += off / DRAWS if math.isfinite(off) else 0.0
        return tuple(means)

    def _walked(
        self, node: TensorNode, operands: Operands, product: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, ...]:
        """The outputs of the parts one after another; of each `mul_mat` what `product` makes of its."""
        known: dict[str, torch.Tensor] = dict(zip(self.inputs, operands.inputs, strict=True))
        for part, plain in zip(self.pattern, self.plain(node), strict=True):
            mine = Operands(
                inputs=tuple(known[port] for port in part.inputs),
                weight=_share(operands.weight, part),
                bias=_share(operands.bias, part),
                gamma=operands.gamma if plain.gamma else (),
            )
            outputs = plain.contract.reference(plain, mine)
            outputs = tuple(map(product, outputs)) if product and part.op == "mul_mat" else outputs
            known.update(zip(part.outputs, outputs, strict=True))
        return tuple(known[port] for port in self.outputs)

    def flops(self, node: TensorNode) -> int:
        return sum(plain.contract.flops(plain) for plain in self.plain(node))


@lru_cache(maxsize=256)
def _plain(op: Fused, node: TensorNode) -> tuple[TensorNode, ...]:
    """As a reference asks for the same node's at each launch: the last few are kept."""
    known = dict(zip(op.inputs, node.inputs, strict=True))
    produced = dict(zip(op.outputs, node.outputs, strict=False))
    nodes = []
    for part in op.pattern:
        plain = _part_node(part, node, tuple(known[port] for port in part.inputs))
        inferred = plain.contract.infer(plain, "f32")
        outputs = tuple(produced.get(port, value) for port, value in zip(part.outputs, inferred, strict=True))
        known.update(zip(part.outputs, outputs, strict=True))
        nodes.append(dataclasses.replace(plain, outputs=outputs))
    return tuple(nodes)


def _part_node(part: Part, node: TensorNode, inputs: tuple[Value, ...]) -> TensorNode:
    """The node of a part: the fused node with only those fields that the part's op takes."""
    plain = dataclasses.replace(
        node,
        name=f"{node.name}.{part.outputs[0]}",
        op=part.op,
        inputs=inputs,
        outputs=(),
        weight=_share(node.weight, part),
        bias=_share(node.bias, part),
    )
    takes = (*plain.contract.fields, *plain.contract.optional, "name", "op", "inputs", "outputs", "layer")
    cleared: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(plain) if f.name not in takes}
    cleared["attributes"] = tuple(pair for pair in node.attributes if pair[0] in takes)
    return dataclasses.replace(plain, **cleared)


def _share(values: tuple[Any, ...], part: Part) -> tuple[Any, ...]:
    """The part's one of the fused node's weights, or biases, where it has any."""
    return () if part.weight is None else values[part.weight : part.weight + 1]
