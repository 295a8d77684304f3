"""What a plan tells of all its nodes: a table, a summary, and who is not on this device.

Enters: a Plan. Leaves: text of at most so many columns, or data for JSON. Everybody who shows a plan shows it by these.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from kernelmux.graph.formats import human_count
from kernelmux.plan.buckets import bounds
from kernelmux.plan.choice import Rejection
from kernelmux.plan.summary import show_summary, summarise
from kernelmux.plan.table import WIDTH, grouped, listed, merged, short, spans, table, wrapped
from kernelmux.plan.why import choice_data, joined

if TYPE_CHECKING:
    from kernelmux.graph.graph import TensorNode
    from kernelmux.plan.formats import Step
    from kernelmux.plan.plan import Plan
    from kernelmux.plan.schedule import Schedule

_ABSENT = ("device", "capability", "missing dependency")
"""The kinds of a backend's refusal that hold for every node: it cannot run here."""

Walked = Mapping[str, Mapping[int, "Step"]]
"""By node, in walking order: its step in each bucket where it is walked."""


def show(plan: Plan, rows: int | None = None, width: int = WIDTH, verbose: bool = False) -> str:
    """The plan as a table, in every bucket or in that of `rows`, and its summary.

    `verbose` has names and reasons in full, and all refusals.
    """
    tops = plan.buckets if rows is None else (plan.bucket(rows),)
    walked = _walked(plan, tops)
    cells = (
        (name, op, _rows(plan, holds), kernel, brief(plan, reason))
        if verbose
        else (short(name), op, _rows(plan, holds), kernel, terse(plan, reason))
        for name, (op, kernel, reason), holds in _grouped(plan, walked)
    )
    lines = [f"{plan.graph.name} on {plan.device.device_class}, by {plan.policy.source}", ""]
    lines += table(("node", "op", "rows", "kernel", "reason"), cells, width, crop=not verbose)
    if verbose and (refused := _refusals(plan, walked)):
        lines += ["", *table(("node", "not taken", "why"), refused, width)]
    lines += ["", *show_summary(plan, width)]
    told = tops if verbose else tuple(dict.fromkeys((tops[0], tops[-1])))
    for line in (_launches(plan, told), *_absent(plan, walked)):
        lines += wrapped(line, width, "  ")
    return "\n".join(lines)


def kernel_counts(schedule: Schedule) -> Mapping[str, Mapping[str, int]]:
    """How many nodes of each op each kernel got: {op: {kernel: nodes}}, in walking order."""
    counts: dict[str, Counter[str]] = {}
    for step in schedule.steps:
        counts.setdefault(step.node.op, Counter())[step.choice.name] += 1
    return counts


def describe(plan: Plan, rows: int) -> dict[str, Any]:
    """The plan at one row count, node by node, for a script."""
    schedule = plan.schedule(rows, rows)
    return {
        "fingerprint": plan.fingerprint,
        "graph": plan.graph.name,
        "policy": plan.policy.source,
        "device": plan.device.device_class,
        "rows": rows,
        "buckets": plan.buckets,
        "launches": schedule.launches,
        "conversions": schedule.conversions,
        "bytes": {
            "activations": schedule.layout.nbytes,
            "workspace": schedule.layout.largest_workspace,
            "weights": plan.packed_bytes,
            "second_copies": plan.extra_copy_bytes,
            "kv_per_token": plan.kv_bytes_per_token,
        },
        "summary": asdict(summarise(plan)),
        "nodes": [{"name": step.node.name, "op": step.node.op, **choice_data(step.choice)} for step in schedule.steps],
    }


def _walked(plan: Plan, tops: Sequence[int]) -> Walked:
    steps = {top: {step.node.name: step for step in plan.schedule(top, top).steps} for top in tops}
    return {name: {top: at[name] for top, at in steps.items() if name in at} for name in merged(steps.values())}


def _grouped(plan: Plan, walked: Walked) -> Iterator[tuple[str, tuple[str, str, str], list[int]]]:
    """Rows of the table: a group of alike nodes, its op, kernel and reason, and the buckets where these hold."""
    rows = (
        (name, tuple((top, _op(step.node), step.choice.name, step.choice.reason) for top, step in at.items()))
        for name, at in walked.items()
    )
    for name, cells in grouped(rows):
        holds: dict[tuple[str, str, str], list[int]] = {}
        for top, op, kernel, reason in cells:
            holds.setdefault((op, kernel, reason), []).append(top)
        yield from ((name, cell, tops) for cell, tops in holds.items())


def _op(node: TensorNode) -> str:
    """A node's op, with the formats that tell alike nodes apart: of weight matrices, or what is converted to what."""
    if node.op == "convert":
        return f"convert {node.inputs[0].format} to {node.outputs[0].format}"
    return " ".join([node.op, *dict.fromkeys(value.format for value in node.weight)])


def brief(plan: Plan, reason: str) -> str:
    """A reason without the policy's path, which the table's first line has."""
    source = plan.policy.source
    return reason.replace(f"({source}:", "(line ").replace(f" ({source})", "")


def terse(plan: Plan, reason: str) -> str:
    """A reason as short as a narrow column needs it: where the policy says so, whether by `auto`, or `fused`."""
    line = re.fullmatch(r"(least predicted time, by )?.*\(line (\d+)\)", told := brief(plan, reason))
    if line is not None:
        # The default policy has no other line.
        return "auto" if line[1] and plan.policy.shipped else f"{'auto' if line[1] else 'line'} {line[2]}"
    return "fused" if reason.startswith("in place of") else told


def _rows(plan: Plan, tops: Sequence[int]) -> str:
    return spans(bounds(plan.buckets, tops))


def run_summary(plan: Plan, width: int = WIDTH) -> list[str]:
    """What a run says of its plan: the summary, and what identifies it."""
    return [*show_summary(plan, width), *wrapped(_launches(plan, [plan.bucket(1)]), width, "  ")]


def _launches(plan: Plan, tops: Sequence[int]) -> str:
    """How many launches a step is in these buckets, and the plan's fingerprint: alike neighbours are told once."""
    steps = [(plan.schedule(top, top), top) for top in tops]
    alike = groupby(steps, key=lambda step: (step[0].launches, step[0].conversions))
    told = [(count, _rows(plan, [top for _, top in steps])) for count, steps in alike]
    (launches, conversions), rows = told[0]
    noun = "row" if rows == "1" else "rows"
    first = f"{human_count(launches, 'launch', 'launches')} ({conversions} conversions) at {rows} {noun}"
    others = (f"{launches} ({conversions}) at {rows}" for (launches, conversions), rows in told[1:])
    return f"{', '.join([first, *others])}; fingerprint {plan.fingerprint}"


def _losers(walked: Walked) -> Iterator[tuple[Step, Rejection]]:
    return ((step, loser) for at in walked.values() for step in at.values() for loser in step.choice.rejected)


def _absent(plan: Plan, walked: Walked) -> Iterator[str]:
    """The line about backends that can run nothing here.

    One that is broken, or merely lacks its library, has been told of among what was missed.
    """
    absent = {
        loser.kernel: loser.reason.removesuffix(f", the plan is for {plan.device.kind}")
        for _, loser in _losers(walked)
        if _backend_is_absent(loser)
        and not (loser.kind == "missing dependency" and loser.kernel in plan.registry.working)
    }
    if absent:
        yield f"not on this device: {', '.join(f'{name} ({reason})' for name, reason in absent.items())}"


def _backend_is_absent(loser: Rejection) -> bool:
    return loser.kind in _ABSENT and ":" not in loser.kernel


def _refusals(plan: Plan, walked: Walked) -> list[tuple[str, str, str]]:
    """Each refusal once: the nodes that it is about, the kernels, and why. Whom another came before is left out."""
    about: dict[tuple[str, str], dict[str, None]] = {}
    for step, loser in _losers(walked):
        if loser.kind != "outranked" and not _backend_is_absent(loser):
            about.setdefault((loser.kernel, loser.reason), {})[step.node.name] = None
    for name, losers in plan.considered.items():
        for loser in losers:
            about.setdefault((loser.kernel, loser.reason), {})[name] = None
    rows: dict[tuple[str, str], list[str]] = {}
    for (kernel, reason), names in about.items():
        rows.setdefault((listed(names), brief(plan, reason)), []).append(kernel)
    return [(nodes, joined(kernels), reason) for (nodes, reason), kernels in rows.items()]
