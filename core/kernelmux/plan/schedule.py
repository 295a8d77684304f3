"""A schedule: what is walked at one pair of buckets, its values' formats and places settled, its variants taken.

Enters: the choices of two buckets. Leaves: steps, conversions among them, and a memory layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from kernelmux.contract.answers import checked_workspace
from kernelmux.contract.kernel import Kernel
from kernelmux.errors import BackendError, contained, named
from kernelmux.graph.graph import Graph, TensorNode, nameless
from kernelmux.graph.rewrite import fuse
from kernelmux.measure.table import Tables
from kernelmux.plan.buckets import Bucket, first_row
from kernelmux.plan.choice import Choice, Taken
from kernelmux.plan.formats import Settling, Step
from kernelmux.plan.memory import Layout, lay_out
from kernelmux.plan.selection import Selector


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

    @property
    def identity(self) -> list[Any]:
        """What its steps do: kernels and their variants, formats, and what follows where one raises."""
        return [
            [
                step.node.name,
                step.choice.name,
                [value.format for value in (*step.node.inputs, *step.node.outputs)],
                [[taken.rows, taken.variant] for taken in step.choice.variants],
                step.choice.on_error,
            ]
            for step in self.steps
        ]

    def rows(self, node: TensorNode) -> int:
        """A node's largest row count here."""
        return node.rows_in({"m": self.m, "outs": self.outs})


@dataclass
class Scheduling:
    """Makes the schedules of one plan; the variants of alike nodes are looked up once."""

    graph: Graph
    selector: Selector
    tops: Sequence[int]
    tables: Tables
    _taken: dict[tuple[Choice, TensorNode, int, int], tuple[Taken, ...]] = field(default_factory=dict)

    def schedule(self, m: Bucket, outs: Bucket) -> Schedule:
        """The steps at one pair of buckets: a node's own rows (of tokens, or of logits) pick its bucket."""

        def bucket(node: TensorNode) -> Bucket:
            return outs if node.inputs[0].shape[0] == "outs" else m

        fusions = [fusion for fusion in m.fusions if bucket(fusion.node) is m]
        fusions += [fusion for fusion in outs.fusions if bucket(fusion.node) is outs and outs is not m]
        chosen = [Step(node, bucket(node).choices[node.name]) for node in fuse(self.graph.ops, fusions)]
        dims = {"m": m.rows, "outs": outs.rows}
        settling = Settling(self.graph, chosen, lambda node: self.selector.choose(node, node.rows_in(dims)), dims)
        for step in chosen:
            settling.add(step)
        values = [self.graph.values[name] for name in self.graph.outputs]
        outputs = tuple(settling.read(value, [value.format]).name for value in values)
        steps = tuple(self._varied(step, step.node.rows_in(dims)) for step in settling.settled)
        resolved = [(step.node.resolve(dims), step.choice) for step in steps]
        joint = {node.name for node, choice in resolved if choice.kernel.joins(node)}
        layout = lay_out([(node, _workspace(node, choice)) for node, choice in resolved], outputs, joint)
        return Schedule(m.rows, outs.rows, steps, layout, outputs)

    def _varied(self, step: Step, top: int) -> Step:
        """The step with the variants that its kernel takes at the rows of its bucket."""
        node, choice = step.node, step.choice
        if self.selector.locked is not None or type(choice.kernel).variants is Kernel.variants:
            return step
        low = first_row(self.tops, top) if isinstance(node.inputs[0].shape[0], str) else top
        key = choice, nameless(node), low, top
        if key not in self._taken:
            self._taken[key] = _taken_variants(self.tables, choice, node, low, top)
        return Step(node, replace(choice, variants=self._taken[key]))


def _taken_variants(tables: Tables, choice: Choice, node: TensorNode, low: int, high: int) -> tuple[Taken, ...]:
    """What a choice takes for a node of `low` to `high` rows; nothing where its kernel has no variants."""
    found: list[Taken] = []
    for rows in _row_classes(low, high):
        if (picked := tables.pick(choice.kernel, node.at(rows))) is None:
            continue
        variant, source = str(picked[0]), picked[1]
        if found and (found[-1].variant, found[-1].source) == (variant, source):
            found.pop()
        found.append(Taken(rows, variant, source))
    return tuple(found)


def _row_classes(low: int, high: int) -> Iterator[int]:
    """Powers of two that cover `low` to `high`, the last one cut off there."""
    rows = 1 << (low - 1).bit_length()
    while rows < high:
        yield rows
        rows *= 2
    yield high


def _workspace(node: TensorNode, choice: Choice) -> int:
    try:
        return checked_workspace(choice.kernel_at(node), node)
    except BackendError:
        raise
    except BaseException as error:
        raise BackendError(
            f"{choice.name}.workspace raised for {node.name}: {named(contained(error))}",
            node=node.name,
            kernel=choice.name,
        ) from error
