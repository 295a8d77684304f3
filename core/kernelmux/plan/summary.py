"""A plan in a few lines: its kernels, how fast they are going to be and what bounds that, memory, what was missed.

Enters: a Plan. Leaves: a Summary, which is data for JSON, and its lines for a person. Nothing is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelmux.graph.formats import human_bytes
from kernelmux.plan.missed import missed
from kernelmux.plan.speed import Speed, Speeds
from kernelmux.plan.table import WIDTH, wrapped

if TYPE_CHECKING:
    from kernelmux.plan.plan import Plan

LABEL = 10
"""Columns of a line's first word."""
SHOWN_BOUNDS = 3
"""How many of the things that bound a step are told."""
MOST = 0.8
"""Of a step's time: the ops that make so much of it are told one by one."""
LEAST_SHARE = 0.05
"""Of a step's time: what bounds less is not told."""


@dataclass(frozen=True)
class Summary:
    """What a newcomer wants to know of a plan."""

    decoding: Speed
    prompts: Speed
    """Of the plan's largest step, with one row of logits."""
    weights: int
    """Bytes of all packed weights."""
    second_copies: int
    """Of these the bytes of packed forms beside the first of each weight."""
    activations: int
    """Bytes of the largest step's activations, workspace among them."""
    workspace: int
    kv_per_token: int
    device_memory: int
    """0 where it is not known."""
    missed: tuple[str, ...]
    """What could make it faster, a clause each, what is surest first."""


def summarise(plan: Plan) -> Summary:
    """What the plan has, and what it is predicted to do."""
    speeds = Speeds(plan)
    largest = plan.schedule(plan.max_rows, plan.max_rows).layout
    return Summary(
        decoding=speeds.at(1),
        prompts=speeds.at(plan.max_rows),
        weights=plan.packed_bytes,
        second_copies=plan.extra_copy_bytes,
        activations=largest.nbytes,
        workspace=largest.largest_workspace,
        kv_per_token=plan.kv_bytes_per_token,
        device_memory=plan.device.memory,
        missed=tuple(missed(plan, speeds)),
    )


def show_summary(plan: Plan, width: int = WIDTH) -> list[str]:
    """The summary as lines of at most so many columns."""
    told = summarise(plan)
    lines = [("decoding", _speed(told.decoding)), ("", _kernels(told.decoding))]
    lines.append(("prompts", _speed(told.prompts)))
    if told.prompts.kernels != told.decoding.kernels:
        lines.append(("", _kernels(told.prompts)))
    lines.append(("memory", _memory(plan, told)))
    lines += [("" if number else "missed", clause) for number, clause in enumerate(told.missed)]
    indent = " " * LABEL
    return [part for label, line in lines for part in wrapped(label.ljust(LABEL) + line, width, indent)]


def _speed(speed: Speed) -> str:
    """`585 tokens/s predicted at 512 tokens: reading weights 71%, launching 12%`."""
    at = f"{speed.context} tokens" if speed.rows == 1 else f"{speed.rows} rows"
    bounds = [(what, share) for what, share in speed.bounds.items() if share >= LEAST_SHARE][:SHOWN_BOUNDS]
    rate = f"{speed.tokens_per_second:,.{0 if speed.tokens_per_second >= 10 else 2}f}"
    return f"{rate} tokens/s predicted at {at}: {', '.join(f'{what} {share:.0%}' for what, share in bounds)}"


def _kernels(speed: Speed) -> str:
    """`mul_mat: 210 torch:int4, 1 torch:int8 (of 5); the rest: torch:f32`, the slowest ops first."""
    ops: dict[tuple[str, ...], list[str]] = {}
    rest: dict[str, None] = {}
    told = 0.0
    for op, counts in speed.kernels.items():
        if told >= MOST:
            rest |= dict.fromkeys(counts)
            continue
        got = tuple(f"{count} {name}" for name, count in counts.items()) if len(counts) > 1 else tuple(counts)
        ops.setdefault(got, []).append(op)
        told += speed.shares[op]
    lists = [f"{', '.join(names)}: {', '.join(got)}" for got, names in ops.items()]
    lists += [f"the rest: {', '.join(rest)}"] if rest else []
    if len(everybody := {name for counts in speed.kernels.values() for name in counts}) == 1:
        lists = [f"all {len(speed.kernels)} ops: {everybody.pop()}"]
    if speed.candidates > 1:
        lists[0] += f" (of {speed.candidates} that could)"
    return "; ".join(lists)


def _memory(plan: Plan, told: Summary) -> str:
    copies = f" ({human_bytes(told.second_copies)} second copies)" if told.second_copies else ""
    room = f"; {plan.device.name} has {human_bytes(told.device_memory)}" if told.device_memory else ""
    return (
        f"weights {human_bytes(told.weights)}{copies}, activations {human_bytes(told.activations)}, "
        f"cache {human_bytes(told.kv_per_token)} a token{room}"
    )
