"""What a plan tells: its table, its needs, and why a node got its kernel.

Enters: a Plan. Leaves: text of at most so many columns, or data for JSON. Everybody who shows a plan shows it by these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kernelmux.errors import PlanError, nearest
from kernelmux.graph.formats import human_bytes
from kernelmux.measure.predict import Predictor
from kernelmux.measure.table import Tables
from kernelmux.plan.buckets import first_row
from kernelmux.plan.choice import Rejection
from kernelmux.plan.table import WIDTH, grouped, listed, members, merged, short, spans, table, wrapped

if TYPE_CHECKING:
    from kernelmux.graph.graph import TensorNode
    from kernelmux.plan.choice import Choice
    from kernelmux.plan.formats import Step
    from kernelmux.plan.plan import Plan
    from kernelmux.plan.schedule import Schedule

_ABSENT = ("device", "capability", "missing dependency")
"""The kinds of a backend's refusal that hold for every node: it cannot run here."""

Walked = Mapping[str, Mapping[int, "Step"]]
"""By node, in walking order: its step in each bucket where it is walked."""


def show(plan: Plan, rows: int | None = None, width: int = WIDTH, verbose: bool = False) -> str:
    """The plan as a table, in every bucket or in that of `rows`, and what it needs; `verbose` adds all refusals."""
    tops = plan.buckets if rows is None else (plan.bucket(rows),)
    walked = _walked(plan, tops)
    cells = (
        (name if verbose else short(name), op, _rows(plan, holds), kernel, reason)
        for name, (op, kernel, reason), holds in _grouped(plan, walked)
    )
    lines = [f"{plan.graph.name} on {plan.device.device_class}, by {plan.policy.source}", ""]
    lines += table(("node", "op", "rows", "kernel", "reason"), cells, width, crop=not verbose)
    if verbose and (refused := _refusals(plan, walked)):
        lines += ["", *table(("node", "not taken", "why"), refused, width)]
    lines.append("")
    for line in (*_needs(plan, [plan.schedule(top, top) for top in tops]), *_absent(plan, walked)):
        lines += wrapped(line, width, "  ")
    return "\n".join(lines)


def summary(plan: Plan, schedule: Schedule) -> list[str]:
    """A few lines: how many nodes of each op each kernel got, and what the plan needs."""
    lines = []
    for op, kernels in kernel_counts(schedule).items():
        total = sum(kernels.values())
        lines.append(f"{op:<15} {', '.join(f'{count}/{total} {name}' for name, count in kernels.items())}")
    return [*lines, *_needs(plan, [schedule])]


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
        "nodes": [{"name": step.node.name, "op": step.node.op, **_choice(step.choice)} for step in schedule.steps],
    }


def why(plan: Plan, name: str) -> str:
    """All about one node, or about what stands for it: kernel, variants and losers in every bucket, fused candidates.

    `name` may be that of a row of the table, `blk.0..29.attn_q`. PlanError for an unknown name.
    """
    names = _nodes_named(plan, name)
    told: dict[str, list[int]] = {}
    for top, steps in _steps_of(plan, names):
        texts = [("\n".join(_reasons(step)), None) for step in steps]
        for text, _ in grouped(texts) if len(texts) > 1 else texts:
            told.setdefault(text, []).append(top)
    lines = [line for text, tops in told.items() for line in f"rows {_rows(plan, tops)}: {text}".split("\n")]
    if considered := _considered(plan, names):
        lines += ["fused candidates:", *_refused(considered)]
    return "\n".join(part for line in lines for part in wrapped(line, WIDTH, "    "))


def why_data(plan: Plan, name: str) -> dict[str, Any]:
    """The same for a script."""
    names = _nodes_named(plan, name)
    return {
        "node": name,
        "buckets": [
            {
                "rows": top,
                "node": step.node.name,
                **_choice(step.choice),
                "variants": [asdict(taken) for taken in step.choice.variants],
            }
            for top, steps in _steps_of(plan, names)
            for step in steps
        ],
        "considered": [asdict(loser) for loser in _considered(plan, names)],
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
            holds.setdefault((op, kernel, brief(plan, reason)), []).append(top)
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


def _rows(plan: Plan, tops: Sequence[int]) -> str:
    return spans(bounds(plan.buckets, tops))


def bounds(buckets: Sequence[int], tops: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The least and the largest row count of these buckets."""
    return ((first_row(buckets, top), top) for top in tops)


def _needs(plan: Plan, schedules: Sequence[Schedule]) -> Iterator[str]:
    launches = (
        f"{each.launches} launches ({each.conversions} conversions) at {_rows(plan, [each.m])} rows"
        for each in schedules
    )
    yield f"{', '.join(launches)}; fingerprint {plan.fingerprint}"
    copies = f" ({human_bytes(plan.extra_copy_bytes)} of it second copies)" if plan.extra_copy_bytes else ""
    layout = schedules[-1].layout
    yield (
        f"weights {human_bytes(plan.packed_bytes)}{copies}, activations {human_bytes(layout.nbytes)} with "
        f"{human_bytes(layout.largest_workspace)} of workspace, cache {human_bytes(plan.kv_bytes_per_token)} a token"
    )
    yield from _predicted(plan)


def _predicted(plan: Plan) -> Iterator[str]:
    """What decoding is predicted to take, where `auto` chose: each call's time, and how much of it was measured."""
    steps = plan.schedule(1, 1).steps
    if any(step.choice.predicted for step in steps):
        predictor = Predictor(plan.device, Tables(plan.device))
        calls = [predictor.of(step.choice.kernel, step.node, 1) for step in steps]
        us = sum(call.us for call in calls)
        measured = sum(call.us for call in calls if not call.declared) / us
        yield (
            f"predicted: {1e6 / us:.0f} tokens/s in decoding at 1 x {predictor.context} ({us / 1e3:.2f} ms a step, "
            f"{measured:.0%} of it measured, the rest as kernels declare)"
        )


def _losers(walked: Walked) -> Iterator[tuple[Step, Rejection]]:
    return ((step, loser) for at in walked.values() for step in at.values() for loser in step.choice.rejected)


def _absent(plan: Plan, walked: Walked) -> Iterator[str]:
    """The line about backends that can run nothing here, and one for each that is broken."""
    absent = {
        loser.kernel: loser.reason.removesuffix(f", the plan is for {plan.device.kind}")
        for _, loser in _losers(walked)
        if _backend_is_absent(loser)
    }
    if absent:
        yield f"not on this device: {', '.join(f'{name} ({reason})' for name, reason in absent.items())}"
    broken = {loser.kernel: loser.reason for _, loser in _losers(walked) if loser.reason.startswith("quarantined: ")}
    yield from (f"{name} is {reason}" for name, reason in broken.items())


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
    return [(nodes, _kernels(kernels), reason) for (nodes, reason), kernels in rows.items()]


def _nodes_named(plan: Plan, name: str) -> list[str]:
    """The nodes that are meant by a name, or by that of a row of the table."""
    steps = [step for top in plan.buckets for step in plan.schedule(top, top).steps]
    known = dict.fromkeys(each for step in steps for each in (step.node.name, *plan.fused.get(step.node.name, ())))
    if not (found := members(name, known)):
        raise PlanError(f"no node {name!r}{nearest(name, known).partition(';')[0]}; kernelmux plan lists them")
    return found


def _steps_of(plan: Plan, names: Sequence[str]) -> Iterator[tuple[int, list[Step]]]:
    """In each bucket the steps of nodes, or of the fused nodes that stand for them."""
    wanted = set(names)
    for top in plan.buckets:
        steps = plan.schedule(top, top).steps
        yield top, [step for step in steps if {step.node.name, *plan.fused.get(step.node.name, ())} & wanted]


def _reasons(step: Step) -> Iterator[str]:
    """A step's choice in words, then a line for its variants and one for each loser."""
    choice = step.choice
    yield f"{step.node.name} ({step.node.op}) runs {choice.name}: {choice.reason}"
    if choice.variants:
        taken = (f"{each.variant} up to {each.rows} rows ({each.source})" for each in choice.variants)
        yield f"  variants: {'; '.join(taken)}"
    yield from _refused(choice.rejected)


def _refused(losers: Iterable[Rejection]) -> Iterator[str]:
    """A line for each reason, with all whom it kept out."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for loser in losers:
        by_reason.setdefault((loser.reason, loser.kind), []).append(loser.kernel)
    yield from (f"  not {_kernels(names)}: {reason} [{kind}]" for (reason, kind), names in by_reason.items())


def _kernels(names: Iterable[str]) -> str:
    """Kernels in a row, a fused op said once: `a:f32, a:f64 of qkv`."""
    by_op: dict[str, list[str]] = {}
    for name in names:
        kernel, _, op = name.partition(" of ")
        by_op.setdefault(op, []).append(kernel)
    return "; ".join(f"{', '.join(kernels)}{op and f' of {op}'}" for op, kernels in by_op.items())


def _considered(plan: Plan, names: Iterable[str]) -> list[Rejection]:
    """The fused candidates that did not take the nodes' place, or that of those which they stand for."""
    plain = dict.fromkeys(each for name in names for each in (name, *plan.fused.get(name, ())))
    return list(dict.fromkeys(loser for each in plain for loser in plan.considered.get(each, ())))


def _choice(choice: Choice) -> dict[str, Any]:
    return {
        "kernel": choice.name,
        "reason": choice.reason,
        "rejected": [asdict(loser) for loser in choice.rejected],
    }
