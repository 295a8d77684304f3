"""What each node may get at one row count: kernels, each with its time, its formats and what storing in them costs.

Enters: a graph's nodes, plain and fused, at a row count; a selector, predicted times. Leaves: options, the more exact
first, so that equals are won by them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from kernelmux.contract.kernel import Kernel
from kernelmux.contract.packed import packed_form
from kernelmux.errors import PlanError
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import Graph, TensorNode
from kernelmux.plan.assign import Option, undominated
from kernelmux.plan.formats import tolerated
from kernelmux.plan.fusion import Fusing
from kernelmux.plan.selection import Held, Selector

FORBIDDING = 1e9
"""Microseconds by which whatever must not be is told from all else."""
LIGHT = 1.25
"""Where not everything fits, packed weights may be so many times as large as the smallest."""


@dataclass(frozen=True)
class Within:
    """What the options of a search are kept to, where a node has others."""

    held: bool = False
    """No further packed form of a weight of which there is one; at a price."""
    lightest: bool = False
    """Packed weights that are not much larger than the smallest."""
    captured: bool = False
    """Kernels that a captured graph can hold."""


@dataclass
class Options:
    """The options of a graph's nodes at one row count, each worked out once."""

    graph: Graph
    selector: Selector
    fusing: Fusing
    parts: Mapping[str, Sequence[TensorNode]]
    """The plain nodes of each fused one, by its name."""
    rows: int
    held: Held
    """The packed forms that there are already, by weight."""
    _all: dict[str, list[Option]] = field(default_factory=dict)
    _of: dict[tuple[str, Within], list[Option]] = field(default_factory=dict)
    _converting: dict[tuple[Value, str, str], float] = field(default_factory=dict)

    def of(self, node: TensorNode, within: Within) -> list[Option]:
        """What a node may get."""
        key = node.name, within
        if key not in self._of:
            options = self._made(node)
            if within.captured:
                options = [option for option in options if option.capturable] or options
            if within.lightest:
                least = min((option.nbytes for option in options), default=0)
                options = [option for option in options if option.nbytes <= LIGHT * least]
            if within.held:
                options = [self._priced(option) for option in options]
            self._of[key] = undominated(options)
        return self._of[key]

    def convert(self, value: Value, source: str, target: str) -> float:
        """Predicted microseconds of a conversion; infinite where nobody has one."""
        key = value, source, target
        if key not in self._converting:
            x, y = (Value(f"x.{end}", value.shape, end) for end in (source, target))
            node = TensorNode(name="convert", op="convert", inputs=(x,), outputs=(y,))
            rows = node.rows_at(self.rows)
            try:
                kernel = self.selector.choose(node, rows).kernel
                self._converting[key] = self.selector.predictor.in_step(kernel, node, rows).us
            except PlanError:
                self._converting[key] = math.inf
        return self._converting[key]

    def _made(self, node: TensorNode) -> list[Option]:
        if node.name not in self._all:
            candidates, own = self._candidates(node), node.rows_at(self.rows)
            errors = {name: self.selector.offers.fitness(kernel, node).error for name, kernel in candidates}
            candidates.sort(key=lambda named: (errors[named[0]], named[0]))
            made = [self._option(node, own, name, kernel, errors[name]) for name, kernel in candidates]
            exact = [port for port, value in enumerate(node.outputs) if value.name in self._exact]
            rounds = {name for name, kernel in candidates if exact and kernel.rounds_to}
            unrounded = [
                option
                for option in made
                if all(node.outputs[port].format in option.writes[port] for port in exact)
                and option.kernel not in rounds
            ]
            self._all[node.name] = unrounded or made
        return self._all[node.name]

    def _candidates(self, node: TensorNode) -> list[tuple[str, Kernel]]:
        own = node.rows_at(self.rows)
        if (parts := self.parts.get(node.name)) is not None:
            return self.fusing.candidates(node, own, parts)
        candidates = self.selector.candidates(node, own)
        if not candidates:
            # It raises, with every refusal.
            self.selector.choose(node, own)
        return candidates

    def _option(self, node: TensorNode, rows: int, name: str, kernel: Kernel, error: float) -> Option:
        reads, writes = self.selector.predictor.storing(kernel, node, rows)
        form = packed_form(node, name, kernel)
        return Option(
            name,
            self.selector.predict(name, kernel, node, rows).us,
            reads,
            writes,
            joins=kernel.joins(node),
            strided=kernel.strided,
            form=form,
            nbytes=kernel.packed_bytes(node) if form else 0,
            error=error,
            tolerates=tolerated(kernel, rows),
            launches=kernel.launches,
            capturable=kernel.capturable,
        )

    @cached_property
    def _exact(self) -> frozenset[str]:
        """Values that are not rounded for speed: what the graph hands back, and sums that go on from layer to layer.

        A product that is rounded is one term of such a sum; a sum that is rounded loses that again at every layer.
        """
        sums = (value.name for node in self.graph.ops if node.op == "add" for value in node.outputs)
        return frozenset({*self.graph.answers, *sums})

    def _priced(self, option: Option) -> Option:
        """The option at a price that is paid only where there is no other, if it packs weights once more."""
        return option if is_held(option, self.held) else replace(option, once=option.once + FORBIDDING)


def is_held(option: Option, held: Held) -> bool:
    """Whether an option needs no further packed form of a weight of which there is one."""
    form = option.form
    return form is None or all(form in held.get(weight, {form}) for weight in form[0])
