"""A schedule: chosen nodes with their values in the formats in which they are really stored, and where those lie.

Enters: nodes with their kernels, in walking order. Leaves: the same with conversions put in where neighbours differ,
and a memory layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from kernelmux.errors import BackendError
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import Graph, TensorNode
from kernelmux.plan.choice import Choice
from kernelmux.plan.memory import Layout, lay_out
from kernelmux.plan.selection import Selector


@dataclass(frozen=True)
class Step:
    """One node of a schedule, and the choice for it. Row counts are still symbols: a walk resolves them."""

    node: TensorNode
    choice: Choice


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
        """The steps whose kernels a CUDA graph cannot hold: with any of them the schedule runs eagerly."""
        return tuple(step for step in self.steps if not step.choice.kernel.capturable)

    def rows(self, node: TensorNode) -> int:
        """A node's largest row count here: the first extent of its first input."""
        return _rows(node, {"m": self.m, "outs": self.outs})


def make_schedule(graph: Graph, chosen: Sequence[Step], selector: Selector, dims: Mapping[str, int]) -> Schedule:
    """Settles formats, inserts conversions, and lays out memory for the largest extents, `dims`."""
    formats = _Formats(graph, chosen, selector, dims)
    for step in chosen:
        formats.add(step)
    outputs = tuple(formats.read(graph.values[name], [graph.values[name].format]).name for name in graph.outputs)
    steps = tuple(formats.settled)
    resolved = [(step.node.resolve(dims), step.choice) for step in steps]
    layout = lay_out([(node, _workspace(node, choice)) for node, choice in resolved], outputs)
    return Schedule(dims["m"], dims["outs"], steps, layout, outputs)


def _workspace(node: TensorNode, choice: Choice) -> int:
    try:
        return choice.kernel.workspace(node)
    except Exception as error:
        raise BackendError(
            f"{choice.name}.workspace raised for {node.name}: {type(error).__name__}: {error}"
        ) from error


class _Formats:
    """Settles how each value is stored, step by step.

    A value is written in the format that saves most conversions; among equals in the one that the graph states, else in
    the kernel's first. A conversion is made once however many nodes read it.
    """

    def __init__(self, graph: Graph, chosen: Sequence[Step], selector: Selector, dims: Mapping[str, int]) -> None:
        self.settled: list[Step] = []
        self._selector = selector
        self._dims = dims
        self._stored = {value.name: value.format for node in graph.leaves for value in node.outputs}
        self._taken = set(graph.values)
        self._converted: dict[tuple[str, str], Value] = {}
        self._wanted = _wanted(graph, chosen)

    def add(self, step: Step) -> None:
        """The step with its values' final formats, after the conversions that it needs."""
        kernel, node = step.choice.kernel, step.node
        accepted = kernel.inputs(node)
        inputs = tuple(self.read(value, formats) for value, formats in zip(node.inputs, accepted, strict=True))
        outputs = []
        for value, emitted in zip(node.outputs, kernel.outputs(node), strict=True):
            format = _cheapest(value, emitted, self._wanted.get(value.name, ()))
            self._stored[value.name] = format
            outputs.append(value if format == value.format else replace(value, format=format))
        self.settled.append(Step(replace(node, inputs=inputs, outputs=tuple(outputs)), step.choice))

    def read(self, value: Value, accepted: Sequence[str]) -> Value:
        """The value as a reader can take it: as it is stored, or converted."""
        held = self._stored[value.name]
        if held in accepted:
            return value if held == value.format else replace(value, format=held)
        made = [format for format in accepted if (value.name, format) in self._converted]
        target = (made or accepted)[0]
        if not made:
            name = f"{value.name}.as_{target}"
            while name in self._taken:
                name += "_"
            source, output = replace(value, format=held), Value(name, value.shape, target)
            node = TensorNode(name=name, op="convert", inputs=(source,), outputs=(output,))
            choice = self._selector.choose(node, _rows(node, self._dims))
            self.settled.append(Step(node, choice))
            self._converted[value.name, target] = output
        return self._converted[value.name, target]


def _wanted(graph: Graph, chosen: Sequence[Step]) -> Mapping[str, list[Sequence[str]]]:
    """For each value, the formats that each of its readers takes; a graph's output is read as the graph states it."""
    wanted: dict[str, list[Sequence[str]]] = {}
    for step in chosen:
        for value, formats in zip(step.node.inputs, step.choice.kernel.inputs(step.node), strict=True):
            wanted.setdefault(value.name, []).append(formats)
    for name in graph.outputs:
        wanted.setdefault(name, []).append([graph.values[name].format])
    return wanted


def _cheapest(value: Value, emitted: Sequence[str], readers: Sequence[Sequence[str]]) -> str:
    """Of the formats that a kernel can write, the one that leaves fewest conversions."""
    if value.format in emitted and all(value.format in formats for formats in readers):
        return value.format

    def conversions(format: str) -> tuple[int, bool, int]:
        needed = {formats[0] for formats in readers if format not in formats}
        return len(needed), format != value.format, emitted.index(format)

    return min(emitted, key=conversions)


def _rows(node: TensorNode, dims: Mapping[str, int]) -> int:
    rows = node.inputs[0].shape[0]
    return dims.get(rows, 1) if isinstance(rows, str) else rows
