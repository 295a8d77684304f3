"""How each value of a plan is stored: in the format that saves most conversions, and those put in that are left.

Enters: nodes with their kernels, in walking order. Leaves: the same with final formats, conversions among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from kernelmux.contract.kernel import Kernel
from kernelmux.graph.formats import Value, lookup
from kernelmux.graph.graph import Graph, TensorNode
from kernelmux.plan.choice import Choice

Wanted = Mapping[str, Sequence[Sequence[str]]]
"""For each value, the formats that each of its readers takes."""


@dataclass(frozen=True)
class Step:
    """One node of a schedule, and the choice for it. Row counts are still symbols: a walk resolves them."""

    node: TensorNode
    choice: Choice


def wanted_formats(graph: Graph, chosen: Iterable[tuple[TensorNode, Choice]]) -> Wanted:
    """What readers take; a graph's output is read as the graph states it."""
    wanted: dict[str, list[Sequence[str]]] = {}
    for node, choice in chosen:
        for value, formats in zip(node.inputs, choice.kernel.inputs(node), strict=True):
            wanted.setdefault(value.name, []).append(formats)
    for name in graph.outputs:
        wanted.setdefault(name, []).append([graph.values[name].format])
    return wanted


def joint_format(kernel: Kernel, node: TensorNode, wanted: Wanted) -> str | None:
    """The one format in which a kernel can write all outputs of a node, and every reader take them; None: none."""
    emitted = kernel.outputs(node)
    readers = [formats for value in node.outputs for formats in wanted.get(value.name, ())]
    fitting = [
        format
        for format in emitted[0]
        if lookup(format).plain and all(format in formats for formats in (*emitted, *readers))
    ]
    return node.outputs[0].format if node.outputs[0].format in fitting else next(iter(fitting), None)


class Settling:
    """Settles how each value is stored, step by step.

    A value is written in the format that saves most conversions; among equals in the one that the graph states, else in
    the kernel's first. A conversion is made once however many nodes read it; `convert` chooses its kernel.
    """

    def __init__(self, graph: Graph, chosen: Sequence[Step], convert: Callable[[TensorNode], Choice]) -> None:
        self.settled: list[Step] = []
        self._convert = convert
        self._stored = {value.name: value.format for node in graph.leaves for value in node.outputs}
        self._taken = set(graph.values)
        self._converted: dict[tuple[str, str], Value] = {}
        self._wanted = wanted_formats(graph, ((step.node, step.choice) for step in chosen))

    def add(self, step: Step) -> None:
        """The step with its values' final formats, after the conversions that it needs."""
        kernel, node = step.choice.kernel, step.node
        accepted = kernel.inputs(node)
        inputs = tuple(self.read(value, formats) for value, formats in zip(node.inputs, accepted, strict=True))
        joint = joint_format(kernel, node, self._wanted) if kernel.joins(node) else None
        outputs = []
        for value, emitted in zip(node.outputs, kernel.outputs(node), strict=True):
            format = joint or _cheapest(value, emitted, self._wanted.get(value.name, ()))
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
            self.settled.append(Step(node, self._convert(node)))
            self._converted[value.name, target] = output
        return self._converted[value.name, target]


def _cheapest(value: Value, emitted: Sequence[str], readers: Sequence[Sequence[str]]) -> str:
    """Of the formats that a kernel can write, the one that leaves fewest conversions."""
    if value.format in emitted and all(value.format in formats for formats in readers):
        return value.format

    def conversions(format: str) -> tuple[int, bool, int]:
        needed = {formats[0] for formats in readers if format not in formats}
        return len(needed), format != value.format, emitted.index(format)

    return min(emitted, key=conversions)
