"""The plan: for every node the kernel, the reason, and each candidate that lost; then formats, conversions and memory.

Enters: Graph, Policy, Registry, Device. Leaves: a frozen Plan with a fingerprint. Row counts fall into buckets within
which the choices are the same; a Schedule is what is walked at one pair of buckets (token rows, rows with logits).
Nothing is launched, packed or allocated here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from kernelmux.device import Device
from kernelmux.errors import PlanError
from kernelmux.formats import Value
from kernelmux.graph import Graph, TensorNode
from kernelmux.memory import Layout, lay_out, packed_key
from kernelmux.policy import Policy
from kernelmux.registry import Registry
from kernelmux.selection import Choice, Selector

MAX_ROWS = 512
"""Token rows of the largest step, unless told: longer prompts run in chunks of it."""


@dataclass(frozen=True)
class Step:
    """One node of a schedule, its values in the formats in which they are really stored, and the choice for it.

    Row counts are still symbols: a walk resolves them.
    """

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


@dataclass(frozen=True)
class Plan:
    """The frozen choice of kernels for a graph on a device; `schedule` is what a walk at given rows runs."""

    graph: Graph
    policy: Policy
    device: Device
    buckets: tuple[int, ...]
    """The largest row count of each bucket, ascending."""
    schedules: Mapping[tuple[int, int], Schedule]

    @property
    def max_rows(self) -> int:
        return self.buckets[-1]

    def bucket(self, rows: int) -> int:
        """The bucket of a row count; PlanError above the largest."""
        return _bucket(self.buckets, rows)

    def schedule(self, m: int, outs: int) -> Schedule:
        """What is walked for `m` token rows of which `outs` give logits."""
        return self.schedules[self.bucket(m), self.bucket(outs)]

    @cached_property
    def fingerprint(self) -> str:
        """Identity of graph, choices with their kernels' versions, buckets and device class; equal in any process."""
        chosen = {
            f"{m}/{outs}": [[step.node.name, step.choice.name, step.choice.kernel.version] for step in schedule.steps]
            for (m, outs), schedule in sorted(self.schedules.items())
        }
        parts = [self.graph.to_json(), self.device.device_class, self.buckets, chosen]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @cached_property
    def packed_bytes(self) -> int:
        """Bytes of every packed form that some schedule needs, each counted once; known before anything is packed."""
        forms = {}
        for schedule in self.schedules.values():
            for step in schedule.steps:
                key = packed_key(step.node, step.choice.name, step.choice.kernel)
                forms[key] = step.choice.kernel.packed_bytes(step.node)
        return sum(forms.values())


def make_plan(graph: Graph, policy: Policy, registry: Registry, device: Device, max_rows: int = MAX_ROWS) -> Plan:
    """Chooses a kernel for every node and lays out its memory.

    Raises PlanError where no kernel takes a node (it lists every refusal), PolicyError where the policy names what does
    not exist, BackendError where no backend is installed.
    """
    selector = Selector(policy, registry, device)
    merged = _merge(graph, selector, _row_counts(policy, max_rows))
    tops = tuple(merged)
    schedules = {
        (m, outs): _schedule(graph, selector, m, outs, merged) for m, outs in itertools.product(tops, tops) if outs <= m
    }
    selector.check_names()
    return Plan(graph, policy, device, tops, schedules)


def _row_counts(policy: Policy, max_rows: int) -> list[int]:
    """Row counts to choose at: powers of two, and each bound of the policy, so that a rule holds for a whole bucket."""
    powers = (2**power for power in range(max_rows.bit_length()))
    return sorted({rows for rows in (*powers, *policy.row_bounds) if rows < max_rows} | {max_rows})


def _merge(graph: Graph, selector: Selector, counts: Sequence[int]) -> Mapping[int, Mapping[str, Choice]]:
    """Choices by the largest row count of each bucket; neighbours with equal choices are one bucket."""
    merged: dict[int, Mapping[str, Choice]] = {}
    previous: tuple[int, list[tuple[str, str]]] | None = None
    kinds = {node.name: selector.kind(node) for node in graph.ops}
    for rows in counts:
        choices = {node.name: selector.choose(node, kinds[node.name], rows) for node in graph.ops}
        signature = [(choice.name, choice.reason) for choice in choices.values()]
        if previous is not None and previous[1] == signature:
            del merged[previous[0]]
        merged[rows] = choices
        previous = (rows, signature)
    return merged


def _schedule(
    graph: Graph, selector: Selector, m: int, outs: int, choices: Mapping[int, Mapping[str, Choice]]
) -> Schedule:
    """The steps at one pair of buckets: a node's own rows (of tokens, or of logits) pick its bucket."""
    dims = {"m": m, "outs": outs}
    tops = tuple(choices)
    chosen = [Step(node, choices[_bucket(tops, _rows(node, dims))][node.name]) for node in graph.ops]
    steps, outputs = _assign_formats(graph, chosen, selector, dims)
    resolved = [(step.node.resolve(dims), step.choice.kernel) for step in steps]
    layout = lay_out([(node, kernel.workspace(node)) for node, kernel in resolved], outputs)
    return Schedule(m, outs, tuple(steps), layout, outputs)


def _bucket(tops: Sequence[int], rows: int) -> int:
    """The smallest bucket that holds `rows`."""
    for top in tops:
        if rows <= top:
            return top
    raise PlanError(f"the plan takes up to {tops[-1]} rows, {rows} were asked for; plan with max_rows={rows}")


def _rows(node: TensorNode, dims: Mapping[str, int]) -> int:
    """A node's row count: the first extent of its first input."""
    rows = node.inputs[0].shape[0]
    return dims[rows] if isinstance(rows, str) else rows


def _assign_formats(
    graph: Graph, steps: Sequence[Step], selector: Selector, dims: Mapping[str, int]
) -> tuple[list[Step], tuple[str, ...]]:
    """Settles how each value is stored, and inserts a conversion where a reader cannot take what its producer writes.

    A value is written in the format that saves most conversions; among equals in the one that the graph states, else in
    the kernel's first. A conversion is made once however many nodes read it.
    """
    wanted = _wanted(graph, steps)
    stored: dict[str, Value] = {value.name: value for node in graph.leaves for value in node.outputs}
    converted: dict[tuple[str, str], Value] = {}
    settled: list[Step] = []

    def read(value: Value, accepted: Sequence[str]) -> Value:
        held = stored[value.name]
        if held.format in accepted:
            return replace(value, format=held.format)
        made = [fmt for fmt in accepted if (value.name, fmt) in converted]
        target = (made or accepted)[0]
        if not made:
            source = replace(value, format=held.format)
            node = TensorNode(
                name=f"{value.name}.as_{target}",
                op="convert",
                inputs=(source,),
                outputs=(Value(f"{value.name}.as_{target}", value.shape, target),),
            )
            settled.append(Step(node, selector.choose(node, selector.kind(node), _rows(node, dims))))
            converted[value.name, target] = node.outputs[0]
        return converted[value.name, target]

    for step in steps:
        accepted = step.choice.kernel.inputs(step.node)
        inputs = tuple(read(value, formats) for value, formats in zip(step.node.inputs, accepted, strict=True))
        outputs = []
        emitted = step.choice.kernel.outputs(step.node)
        for value, formats in zip(step.node.outputs, emitted, strict=True):
            outputs.append(replace(value, format=_cheapest(value, formats, wanted.get(value.name, ()))))
            stored[value.name] = outputs[-1]
        settled.append(Step(replace(step.node, inputs=inputs, outputs=tuple(outputs)), step.choice))
    outputs_as = tuple(read(stored[name], [graph.values[name].format]).name for name in graph.outputs)
    return settled, outputs_as


def _wanted(graph: Graph, steps: Sequence[Step]) -> Mapping[str, list[Sequence[str]]]:
    """For each value, the formats that each of its readers takes; a graph's output is read as the graph states it."""
    wanted: dict[str, list[Sequence[str]]] = {}
    for step in steps:
        for value, formats in zip(step.node.inputs, step.choice.kernel.inputs(step.node), strict=True):
            wanted.setdefault(value.name, []).append(formats)
    for name in graph.outputs:
        wanted.setdefault(name, []).append([graph.values[name].format])
    return wanted


def _cheapest(value: Value, emitted: Sequence[str], readers: Sequence[Sequence[str]]) -> str:
    """Of the formats that a kernel can write, the one that leaves fewest conversions."""

    def conversions(format: str) -> tuple[int, bool, int]:
        needed = {formats[0] for formats in readers if format not in formats}
        return len(needed), format != value.format, emitted.index(format)

    return min(emitted, key=conversions)


def kernel_counts(schedule: Schedule) -> Mapping[str, Mapping[str, int]]:
    """How many nodes of each op each kernel got: {op: {kernel: nodes}}, in walking order."""
    counts: dict[str, dict[str, int]] = {}
    for step in schedule.steps:
        of_op = counts.setdefault(step.node.op, {})
        of_op[step.choice.name] = of_op.get(step.choice.name, 0) + 1
    return counts
