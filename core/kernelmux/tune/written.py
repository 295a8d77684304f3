"""A policy as a person would have written it, from plans that were measured: rules by op, each with its times.

Enters: sections, which say what plan holds up to how many rows. Leaves: TOML text, by which a plan chooses the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from kernelmux.graph.formats import human_count
from kernelmux.graph.graph import Graph, TensorNode
from kernelmux.graph.ops import fused_ops
from kernelmux.graph.rewrite import find_fusions
from kernelmux.measure.predict import Prediction, human_time
from kernelmux.plan.formats import Step
from kernelmux.plan.plan import Plan
from kernelmux.policy.grammar import PARTS

WORTH_TELLING = 10.0
"""A comment has the times of others that take up to so many times as long."""

Told = Callable[[TensorNode, int], Mapping[str, Prediction]]
"""How long each kernel that may run a node takes at a row count."""
Row = tuple[str | None, ...]
"""What a node gets in each range of rows: a kernel, PARTS, or None where it is not walked."""


@dataclass(frozen=True)
class Section:
    """The plan whose choices hold up to a row count, from the section before."""

    high: int
    plan: Plan


@dataclass(frozen=True)
class Span:
    """A range of rows with one choice for each node, and what is walked there."""

    low: int
    high: int
    steps: Sequence[Step]


@dataclass(frozen=True)
class Group:
    """Nodes of one op that get the same kernels, and the keys of a rule that name these and no others."""

    op: str
    nodes: tuple[TensorNode, ...]
    row: Row
    keys: Mapping[str, Sequence[str]]


def spans(sections: Sequence[Section]) -> list[Span]:
    """The ranges within which all choices are the same, from one row to the last section's end."""
    found: list[Span] = []
    low = 1
    for section in sections:
        for top in section.plan.buckets:
            if top >= low:
                high = min(top, section.high)
                found.append(Span(low, high, section.plan.schedule(top, top).steps))
                low = high + 1
            if low > section.high:
                break
    return found


def write_rules(graph: Graph, sections: Sequence[Section], told: Told, counts: Sequence[int]) -> str:
    """The rules, in walking order; a comment tells times at those of `counts` that a rule is for."""
    ranges = spans(sections)
    rows = _rows(graph, ranges)
    nodes = {node.name: node for node in (*graph.ops, *(f.node for f in find_fusions(graph, fused_ops())))}
    lines: list[str] = []
    apart: list[str] = []
    for op in dict.fromkeys(node.op for node in nodes.values()):
        own = [(nodes[name], row) for name, row in rows.items() if nodes[name].op == op]
        if all(set(row) == {PARTS} for _, row in own):
            apart.append(op)
            continue
        for group in _groups(op, own):
            lines += _rules(group, ranges, told, counts)
    lines += _conversions(ranges)
    if apart:
        lines += ["", "# Faster as several nodes.", "[[rule]]", f"op = {_listed(apart)}", f'use = "{PARTS}"']
    return "\n".join(lines)


def _rows(graph: Graph, ranges: Sequence[Span]) -> dict[str, Row]:
    """By name what every node gets, plain ones and those that may be fused."""
    walked = [{step.node.name: step.choice.name for step in span.steps} for span in ranges]
    rows: dict[str, Row] = {node.name: tuple(at.get(node.name) for at in walked) for node in graph.ops}
    for fusion in find_fusions(graph, fused_ops()):
        rows[fusion.node.name] = tuple(at.get(fusion.node.name, PARTS) for at in walked)
    return rows


def _groups(op: str, rows: Sequence[tuple[TensorNode, Row]]) -> Iterator[Group]:
    """An op's nodes by what they get, most nodes last: a rule need not tell those apart whom none before it is for."""
    merged: list[tuple[list[TensorNode], Row]] = []
    # The rows that say most come first, so that the others join them.
    for node, row in sorted(rows, key=lambda entry: sum(state is None for state in entry[1])):
        for index, (members, known) in enumerate(merged):
            if all(one == other or None in (one, other) for one, other in zip(row, known, strict=True)):
                members.append(node)
                merged[index] = members, tuple(one or other for one, other in zip(row, known, strict=True))
                break
        else:
            merged.append(([node], row))
    # Those of one format first: what is left then needs no word for its formats.
    merged.sort(key=lambda entry: (len({value.format for node in entry[0] for value in node.weight}), len(entry[0])))
    left = [node for node, _ in rows]
    for members, row in merged:
        yield Group(op, tuple(members), row, _keys(members, left))
        gone = {node.name for node in members}
        left = [node for node in left if node.name not in gone]


def _keys(members: Sequence[TensorNode], among: Sequence[TensorNode]) -> Mapping[str, Sequence[str]]:
    """The shortest keys that tell some nodes from all others."""
    patterns = list(dict.fromkeys(re.sub(r"\d+", "*", node.name) for node in members))
    formats = list(dict.fromkeys(value.format for node in members for value in node.weight))
    ours = {node.name for node in members}
    ways: list[Mapping[str, Sequence[str]]] = [{}, {"weight": formats}, {"node": patterns}]
    ways.append({"node": patterns, "weight": formats})
    for keys in ways:
        if ("weight" not in keys or formats) and {node.name for node in among if _matches(keys, node)} == ours:
            return keys
    return {"node": sorted(ours)}


def _matches(keys: Mapping[str, Sequence[str]], node: TensorNode) -> bool:
    """As a rule with these keys does (policy/grammar.py)."""
    weight = keys.get("weight")
    return any(fnmatchcase(node.name, pattern) for pattern in keys.get("node", ["*"])) and (
        weight is None or (bool(node.weight) and all(value.format in weight for value in node.weight))
    )


def _rules(group: Group, ranges: Sequence[Span], told: Told, counts: Sequence[int]) -> Iterator[str]:
    for low, high, kernel in _merged(ranges, group.row):
        yield ""
        inside = [rows for rows in counts if low <= rows <= high] or [high]
        yield from _comment(kernel, group.nodes[0], inside, told)
        yield "[[rule]]"
        yield f"op = {json.dumps(group.op)}"
        yield from (f"{key} = {_listed(values)}" for key, values in group.keys.items())
        yield from _rows_key(low, high, ranges)
        yield f"use = {json.dumps(kernel)}"


def _merged(ranges: Sequence[Span], row: Row) -> Iterator[tuple[int, int, str]]:
    """Neighbouring ranges with one kernel as one; where nothing is walked, what holds before or after goes on."""
    known = [(span, state) for span, state in zip(ranges, row, strict=True) if state is not None]
    place = 0
    while place < len(known):
        end = place
        while end + 1 < len(known) and known[end + 1][1] == known[place][1]:
            end += 1
        low = ranges[0].low if place == 0 else known[place][0].low
        high = ranges[-1].high if end + 1 == len(known) else known[end + 1][0].low - 1
        yield low, high, str(known[place][1])
        place = end + 1


def _comment(kernel: str, node: TensorNode, counts: Iterable[int], told: Told) -> Iterator[str]:
    """A line for each row count: the kernel's time, and the next best one's."""
    if kernel == PARTS:
        return
    for rows in counts:
        times = dict(told(node, rows))
        own = times.pop(kernel, None)
        if own is None:
            continue
        slower = {name: each for name, each in times.items() if each.us <= WORTH_TELLING * own.us}
        others = sorted(slower, key=lambda name: (slower[name].us, name))[:2]
        rest = "".join(f"; {name} {_time(slower[name])}" for name in others)
        yield f"# {human_count(rows, 'row')}: {_time(own)}{rest}"


def _time(told: Prediction) -> str:
    return human_time(told.us) + (" declared" if told.declared else "")


def _conversions(ranges: Sequence[Span]) -> Iterator[str]:
    """Rules for what stands between kernels, by the format that it makes."""
    targets: dict[str, dict[int, str]] = {}
    for index, span in enumerate(ranges):
        for step in span.steps:
            if step.node.op == "convert":
                targets.setdefault(step.node.outputs[0].format, {})[index] = step.choice.name
    for target, kernels in targets.items():
        row: Row = tuple(kernels.get(index) for index in range(len(ranges)))
        for low, high, kernel in _merged(ranges, row):
            yield from ("", "[[rule]]", 'op = "convert"', f"where = {{ target = {json.dumps(target)} }}")
            yield from _rows_key(low, high, ranges)
            yield f"use = {json.dumps(kernel)}"


def _rows_key(low: int, high: int, ranges: Sequence[Span]) -> Iterator[str]:
    """The key `m`, unless a rule is for all rows; the last range goes on without end."""
    if high < ranges[-1].high:
        yield f'm = "{low}..{high}"' if low < high else f"m = {low}"
    elif low > ranges[0].low:
        yield f'm = "{low}.."'


def _listed(values: Sequence[str]) -> str:
    return json.dumps(values[0] if len(values) == 1 else list(values))
