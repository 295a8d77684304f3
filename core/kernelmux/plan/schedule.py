"""A schedule: what is walked at one pair of buckets, its values' formats and places settled, its variants taken.

Enters: nodes with their kernels, in walking order. Leaves: steps, conversions among them, and a memory layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from kernelmux.errors import BackendError
from kernelmux.graph.graph import Graph, TensorNode
from kernelmux.plan.choice import Choice
from kernelmux.plan.formats import Settling, Step
from kernelmux.plan.memory import Layout, lay_out

Vary = Callable[[TensorNode, Choice], Choice]
"""The choice with the variants that it takes at a node's rows."""


@dataclass(frozen=True)
class Schedule:
    """What is walked at up to `m` token rows and `outs` rows with logits: steps, conversions among them, and memory."""

    m: int
    outs: int
    steps: tuple[Step, ...]
    layout: Layout
    outputs: tuple[str, ...]
    """The names under which the graph's outputs are stored."""

    @property
    def launches(self) -> int:
        """Device launches of a walk."""
        return sum(step.choice.kernel.launches for step in self.steps)

    @property
    def conversions(self) -> int:
        """Convert nodes that the plan put in."""
        return sum(step.node.op == "convert" for step in self.steps)

    @cached_property
    def not_capturable(self) -> tuple[Step, ...]:
        """The steps whose kernels a captured graph cannot hold: with any of them the schedule runs eagerly."""
        return tuple(step for step in self.steps if not step.choice.kernel.capturable)

    def rows(self, node: TensorNode) -> int:
        """A node's largest row count here."""
        return node.rows_in({"m": self.m, "outs": self.outs})


def make_schedule(
    graph: Graph,
    chosen: Sequence[Step],
    convert: Callable[[TensorNode], Choice],
    vary: Vary,
    dims: Mapping[str, int],
) -> Schedule:
    """Settles formats, inserts conversions, and lays out memory for the largest extents, `dims`."""
    settling = Settling(graph, chosen, convert)
    for step in chosen:
        settling.add(step)
    outputs = tuple(settling.read(graph.values[name], [graph.values[name].format]).name for name in graph.outputs)
    steps = tuple(replace(step, choice=vary(step.node, step.choice)) for step in settling.settled)
    resolved = [(step.node.resolve(dims), step.choice) for step in steps]
    joint = {node.name for node, choice in resolved if choice.kernel.joins(node)}
    layout = lay_out([(node, _workspace(node, choice)) for node, choice in resolved], outputs, joint)
    return Schedule(dims["m"], dims["outs"], steps, layout, outputs)


def _workspace(node: TensorNode, choice: Choice) -> int:
    try:
        return choice.kernel_at(node).workspace(node)
    except Exception as error:
        raise BackendError(
            f"{choice.name}.workspace raised for {node.name}: {type(error).__name__}: {error}",
            node=node.name,
            kernel=choice.name,
        ) from error
