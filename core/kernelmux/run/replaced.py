"""Kernels that raised in a session and gave way to others, as the policy's `on_error = "next"` asks: who, and to whom.

Enters: the plans before and after, and the error between them. Leaves: a Replaced, and lines for a person.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kernelmux.errors import LaunchError
from kernelmux.plan.plan import Plan
from kernelmux.plan.table import listed


@dataclass(frozen=True)
class Replaced:
    """A node whose kernel raised, and what runs since."""

    node: str
    kernel: str
    error: str
    """One line, with the place that raised."""
    instead: tuple[str, ...]
    """More than one kernel where the node was a fused one, or other rows get another."""


def replaced(error: LaunchError, before: Plan, after: Plan) -> Replaced:
    """Of a kernel that raised: what `after` runs in its place, in the buckets where `before` ran it."""
    return Replaced(error.node, error.kernel, error.reason, tuple(dict.fromkeys(_in_place_of(error, before, after))))


def _in_place_of(error: LaunchError, before: Plan, after: Plan) -> Iterator[str]:
    gone = {error.node, *before.fused.get(error.node, ())}
    for top in before.buckets:
        ran = {(step.node.name, step.choice.name) for step in before.schedule(top, top).steps}
        if (error.node, error.kernel) not in ran:
            continue
        for step in after.schedule(top, top).steps:
            if gone & {step.node.name, *after.fused.get(step.node.name, ())}:
                yield step.choice.name


def told(several: Iterable[Replaced]) -> list[str]:
    """A line for each kernel, its error and what runs instead: alike nodes as one."""
    nodes: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for each in several:
        nodes.setdefault((each.kernel, each.error, each.instead), []).append(each.node)
    return [
        f"{kernel} raised at {listed(names)}: {error}; {', '.join(instead)} runs instead"
        for (kernel, error, instead), names in nodes.items()
    ]
