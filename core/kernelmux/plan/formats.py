"""How each value of a plan is stored: in the format that saves most conversions, and those put in that are left.

Enters: nodes with their kernels, in walking order. Leaves: the same with final formats, conversions among them. The
assignment of kernels counts by the same rule, `best_format` and `format_read`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from kernelmux.contract.kernel import Kernel
from kernelmux.graph.formats import Value, lookup, row_bytes
from kernelmux.graph.graph import Graph, TensorNode
from kernelmux.measure.works import PROMPT
from kernelmux.plan.choice import Choice


class Reader(NamedTuple):
    """What a kernel reads of one value."""

    formats: tuple[str, ...]
    """Those that it takes, best first."""
    tolerates: float = 0.0
    """The rounding, as NMSE, that the value may have had for the sake of time."""


Wanted = Mapping[str, Sequence[Reader]]
"""The readers of each value, in walking order."""


@dataclass(frozen=True)
class Step:
    """One node of a schedule, and the choice for it. Row counts are still symbols: a walk resolves them."""

    node: TensorNode
    choice: Choice


def tolerated(kernel: Kernel, rows: int) -> float:
    """The rounding that a kernel's inputs may have for the sake of time: as much as it errs by itself.

    None at few rows, where storing takes no time.
    """
    return kernel.precision if rows >= PROMPT else 0.0


def wanted_formats(
    graph: Graph, chosen: Iterable[tuple[TensorNode, Choice]], dims: Mapping[str, int] | None = None
) -> Wanted:
    """Who reads what, at few rows unless told; a graph's output is read as the graph states it."""
    wanted: dict[str, list[Reader]] = {}
    for node, choice in chosen:
        kernel = choice.kernel
        tolerates = tolerated(kernel, node.rows_in(dims)) if dims else 0.0
        for value, formats in zip(node.inputs, kernel.inputs(node), strict=True):
            wanted.setdefault(value.name, []).append(Reader(tuple(formats), tolerates))
    for name in graph.outputs:
        wanted.setdefault(name, []).append(Reader((graph.values[name].format,)))
    return wanted


def best_format(value: Value, emitted: Collection[str], readers: Sequence[Reader]) -> str:
    """Of the formats that a writer emits the one in which a value is stored.

    It leaves the fewest conversions. Of those that do, it is the graph's own, or one that every reader tolerates; of
    these the one in the fewest bytes; of equals the graph's, else the writer's first.
    """
    if len(emitted) == 1:
        return next(iter(emitted))
    columns = int(value.shape[1]) if value.convertible else 0
    return _best(value.format, columns, tuple(emitted), tuple(readers))


@cache
def _best(stated: str, columns: int, emitted: tuple[str, ...], readers: tuple[Reader, ...]) -> str:
    """The same of a format that the graph states: a plan asks it thousands of times, of few kinds of values."""

    def badness(format: str) -> tuple[int, bool, int, bool]:
        needed = {accepted[0] for accepted, _ in readers if format not in accepted}
        own, rounding = format == stated, lookup(format).rounding
        narrow = not own and any(rounding > tolerates for accepted, tolerates in readers if stated in accepted)
        return len(needed), narrow, row_bytes(format, columns) if columns else 0, not own

    return min(emitted, key=badness)


def format_read(accepted: Collection[str], stored: str, converted: Collection[str]) -> str:
    """What a reader reads: a value as it is stored, else as it has been converted already, else what it likes best."""
    if stored in accepted:
        return stored
    return next((format for format in accepted if format in converted), next(iter(accepted)))


def joint_formats(emitted: Sequence[Collection[str]], readers: Sequence[Reader] = ()) -> Sequence[str]:
    """The formats in which a kernel can write all outputs of a node side by side, and every reader take them."""
    return [
        format
        for format in emitted[0]
        if lookup(format).plain
        and all(format in formats for formats in emitted)
        and all(format in reader.formats for reader in readers)
    ]


def joint_format(kernel: Kernel, node: TensorNode, wanted: Wanted) -> str | None:
    """The one format in which a kernel writes all outputs of a node, and every reader takes them; None: none."""
    readers = [reader for value in node.outputs for reader in wanted.get(value.name, ())]
    fitting = joint_formats(kernel.outputs(node), readers)
    return best_format(node.outputs[0], fitting, readers) if fitting else None


class Settling:
    """Settles how each value is stored, step by step.

    A value is written as `best_format` says. A conversion is made once however many nodes read it; `convert` chooses
    its kernel.
    """

    def __init__(
        self, graph: Graph, chosen: Sequence[Step], convert: Callable[[TensorNode], Choice], dims: Mapping[str, int]
    ) -> None:
        self.settled: list[Step] = []
        self._convert = convert
        self._stored = {value.name: value.format for node in graph.leaves for value in node.outputs}
        self._taken = set(graph.values)
        self._converted: dict[str, dict[str, Value]] = {}
        self._wanted = wanted_formats(graph, ((step.node, step.choice) for step in chosen), dims)

    def add(self, step: Step) -> None:
        """The step with its values' final formats, after the conversions that it needs."""
        kernel, node = step.choice.kernel, step.node
        accepted = kernel.inputs(node)
        inputs = tuple(self.read(value, formats) for value, formats in zip(node.inputs, accepted, strict=True))
        joint = joint_format(kernel, node, self._wanted) if kernel.joins(node) else None
        outputs = []
        for value, emitted in zip(node.outputs, kernel.outputs(node), strict=True):
            format = joint or best_format(value, emitted, self._wanted.get(value.name, ()))
            self._stored[value.name] = format
            outputs.append(value.stored(format))
        self.settled.append(Step(node.on(inputs, tuple(outputs)), step.choice))

    def read(self, value: Value, accepted: Sequence[str]) -> Value:
        """The value as a reader can take it: as it is stored, or converted."""
        held, converted = self._stored[value.name], self._converted.setdefault(value.name, {})
        target = format_read(accepted, held, converted)
        if target == held:
            return value.stored(held)
        if target not in converted:
            name = f"{value.name}.as_{target}"
            while name in self._taken:
                name += "_"
            source, output = value.stored(held), Value(name, value.shape, target)
            node = TensorNode(name=name, op="convert", inputs=(source,), outputs=(output,))
            self.settled.append(Step(node, self._convert(node)))
            converted[target] = output
        return converted[target]
