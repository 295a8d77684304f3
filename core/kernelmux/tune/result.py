"""What tuning found, as lines for a person: on a terminal, and at the head of the policy file."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from kernelmux.measure.report import machine
from kernelmux.plan.table import table
from kernelmux.tune.tuning import Asked, Tuned

RATE = "tokens/s of whole steps; up to 127 rows decode a sequence each, more are one prompt"


def compared_lines(tuned: Tuned, counts: Sequence[int], width: int) -> list[str]:
    """Tokens a second of every way to run the model, by rows; `*` marks the one whose choices the policy took."""
    ways = [way for way in tuned.compared if way.times]
    cells = []
    for rows in counts:
        marked = (f"{_rate(rows, way.times.get(rows))}{'*' * (tuned.winners[rows] == way.label)}" for way in ways)
        cells.append([str(rows), *marked])
    return list(table(("rows", *(way.label for way in ways)), cells, width))


def frontier_lines(tuned: Tuned, width: int) -> list[str]:
    """What more and less exact choices would give."""
    cells = []
    for point in tuned.frontier:
        budget = "the default's" if point.max_error is None else f"{point.max_error:g}"
        rates = [_rate(rows, us) for rows, us in point.times.items()]
        nats = ["not measured"] * 2 if point.divergence is None else [f"{each:.2g}" for each in point.divergence]
        cells.append([point.label, budget, *rates, *nats])
    ends = [f"{rows} rows" for rows in (tuned.frontier[0].times if tuned.frontier else ())]
    return list(table(("choice", "--max-error", *ends, "KL of prompts", "KL of decoding"), cells, width))


def describe(asked: Asked, tuned: Tuned) -> dict[str, Any]:
    """All of it for a script: microseconds of whole steps by rows, nats a token, the policy's text without its head."""
    return {
        "device": asked.device.device_class,
        "context": asked.context,
        "answered": tuned.measured.answered,
        "unsteady": tuned.measured.unsteady,
        "left": tuned.measured.left,
        "faults": tuned.measured.faults,
        "compared": [asdict(way) for way in tuned.compared],
        "winners": tuned.winners,
        "frontier": [asdict(point) for point in tuned.frontier],
        "notes": tuned.notes,
        "fingerprint": tuned.plan.fingerprint,
        "policy": tuned.policy,
    }


def policy_text(asked: Asked, tuned: Tuned, command: str, versions: dict[str, str], width: int = 100) -> str:
    """The policy file: where it is from and what it gave as comments, then its rules."""
    lines = [
        f"Written by `{command}` on {datetime.date.today().isoformat()}.",
        f"Measured on {machine(asked.device)}: {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
        f"{RATE[0].upper()}{RATE[1:]}, {asked.context} cached tokens each:",
        *compared_lines(tuned, asked.counts, width),
        "",
        "KL divergence from float32 in nats a token, beside speed:",
        *frontier_lines(tuned, width),
        *_left_out(tuned),
    ]
    head = "\n".join(f"# {line}".rstrip() for line in lines)
    key = f'tuned_for = "{asked.device.device_class}"\n'
    return f"{head}\n\n{key}{tuned.policy}"


def _left_out(tuned: Tuned) -> Iterator[str]:
    if tuned.measured.left:
        yield ""
        yield f"There was no time to measure {tuned.measured.left} kernels more: they are taken as they declare."
    if tuned.measured.faults:
        yield ""
        yield "Left out:"
        yield from (f"{subject}: {fault}" for subject, fault in tuned.measured.faults.items())


def _rate(rows: int, us: float | None) -> str:
    """Tokens a second, to three digits or whole."""
    if us is None:
        return "-"
    rate = rows / us * 1e6
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
