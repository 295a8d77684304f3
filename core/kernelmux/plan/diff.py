"""What moves between two plans of one model: two policies, or a lock and a policy.

Enters: two Plans. Leaves: every node that gets something else, as data or as a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelmux.plan.buckets import bounds
from kernelmux.plan.explain import brief, terse
from kernelmux.plan.table import WIDTH, grouped, merged, short, spans, table

if TYPE_CHECKING:
    from kernelmux.plan.choice import Choice
    from kernelmux.plan.plan import Plan


@dataclass(frozen=True)
class Move:
    """A node whose kernel differs between two plans, at up to so many rows; `-` where it is not walked."""

    rows: int
    node: str
    before: str
    after: str
    reason: str


def moves(before: Plan, after: Plan) -> list[Move]:
    """Every node that another kernel, another variant or another `on_error` gets at some row count, and why."""
    found = []
    for top in sorted({*before.buckets, *after.buckets}):
        ours, theirs = (_at(p, min(top, p.max_rows)) for p in (before, after))
        for name in merged((ours, theirs)):
            was, now = ours.get(name), theirs.get(name)
            if (told := _told(was, now)) is not None:
                found.append(Move(top, name, *told, now.reason if now else "another node takes its place"))
    return found


def show_diff(before: Plan, after: Plan, width: int = WIDTH) -> str:
    """Those moves as a table, alike layers and row counts as one row, and a line that counts them."""
    moved = moves(before, after)
    tops = sorted({*before.buckets, *after.buckets})
    holds: dict[str, dict[tuple[str, str, str], list[int]]] = {}
    for name in merged([move.node for move in moved if move.rows == top] for top in tops):
        holds[name] = {}
    for move in moved:
        holds[move.node].setdefault((move.before, move.after, move.reason), []).append(move.rows)
    flat = ((name, (cells, tuple(at))) for name, of_node in holds.items() for cells, at in of_node.items())
    rows = [
        (short(name), spans(bounds(tops, at)), was, now, _reason(after, reason))
        for name, ((was, now, reason), at) in grouped(flat)
    ]
    lines = [*table(("node", "rows", "before", "after", "reason"), rows, width, crop=True), ""] if rows else []
    return "\n".join([*lines, f"{len(holds)} nodes move; fingerprints {before.fingerprint} and {after.fingerprint}"])


def _at(plan: Plan, rows: int) -> dict[str, Choice]:
    return {step.node.name: step.choice for step in plan.schedule(rows, rows).steps}


def _told(was: Choice | None, now: Choice | None) -> tuple[str, str] | None:
    """How two choices for a node differ: by kernel, else by its variants and what follows where it raises."""
    names = tuple(choice.name if choice else "-" for choice in (was, now))
    if was is None or now is None or was.name != now.name:
        return names[0], names[1]
    details = tuple(
        f"{choice.name} {','.join(taken.variant for taken in choice.variants)} on_error={choice.on_error}"
        for choice in (was, now)
    )
    return None if details[0] == details[1] else (details[0], details[1])


def _reason(plan: Plan, reason: str) -> str:
    """A reason that fits beside two kernels: that `auto` chose says enough."""
    told = terse(plan, reason)
    return told if told.startswith("auto") else brief(plan, reason)
