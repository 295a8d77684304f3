"""What a run of the suite found, as a matrix of op, weight format and kernel.

Enters: Outcomes. Leaves: a Report, and from it JSON, Markdown, or text for a terminal; `html` makes a page of it.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kernelmux.conformance.outcome import Outcome, Status, share

if TYPE_CHECKING:
    from rich.console import Console

    from kernelmux.contract.registry import Backend

SIGNS: Mapping[Status, str] = {"fail": "✗", "known": "!", "pass": "✓", "refused": "–"}
"""How each status is written where there is room for one sign; the worst first."""
COLOURS: Mapping[Status, str] = {"fail": "bold red", "known": "yellow", "pass": "green", "refused": "dim"}


@dataclass(frozen=True)
class Cell:
    """All cases of one op, with weights in one format, on one kernel."""

    op: str
    """Empty for stale entries of known_failures.toml, which belong to no case."""
    weight_format: str
    kernel: str
    outcomes: tuple[Outcome, ...]

    @property
    def counts(self) -> Mapping[Status, int]:
        return count(self.outcomes)

    @property
    def status(self) -> Status:
        """The worst of its cases'; `refused` only where all are."""
        return next(status for status in SIGNS if self.counts[status])

    @property
    def worst(self) -> Outcome | None:
        """The measured case that is furthest over its bound, or closest to it."""
        measured = [outcome for outcome in self.outcomes if outcome.error is not None]
        return max(measured, key=share, default=None)

    @property
    def bound(self) -> float | None:
        """The tightest of its cases' bounds: where a case stores in fewer bits, their rounding comes on top."""
        return min((outcome.bound for outcome in self.outcomes if outcome.bound is not None), default=None)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why cases were refused, each reason once."""
        return tuple(dict.fromkeys(outcome.reason for outcome in self.outcomes if outcome.status == "refused"))

    @property
    def batch_invariant(self) -> bool | None:
        """Whether every case that says so is; None where none does."""
        known = [outcome.batch_invariant for outcome in self.outcomes if outcome.batch_invariant is not None]
        return all(known) if known else None

    @property
    def text(self) -> str:
        """A sign and a count for each status that occurs, the worst first."""
        return " ".join(f"{SIGNS[status]}{number}" for status, number in self.counts.items() if number)


@dataclass(frozen=True)
class Report:
    """A run of the suite: what it found, on what, with which versions."""

    outcomes: tuple[Outcome, ...]
    device: str
    versions: Mapping[str, str]
    made: str
    notes: tuple[str, ...] = ()
    """Backends that were not checked, and why."""

    @property
    def totals(self) -> Mapping[Status, int]:
        return count(self.outcomes)

    @property
    def backends(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(outcome.kernel.partition(":")[0] for outcome in self.outcomes))

    @cached_property
    def cells(self) -> list[Cell]:
        """The matrix: by op, then weight format, then kernel, each in the order in which it was run."""
        groups: dict[tuple[str, str, str], list[Outcome]] = {}
        for outcome in self.outcomes:
            groups.setdefault((outcome.op, outcome.weight_format, outcome.kernel), []).append(outcome)
        ops = list(dict.fromkeys(op for op, _, _ in groups))
        formats = list(dict.fromkeys(format for _, format, _ in groups))
        keys = sorted(groups, key=lambda key: (ops.index(key[0]), formats.index(key[1])))
        return [Cell(*key, tuple(groups[key])) for key in keys]

    def of(self, status: Status) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == status]

    @property
    def refusals(self) -> Mapping[tuple[str, str], int]:
        """How many cases each kernel refused for each reason, the most frequent first."""
        found: dict[tuple[str, str], int] = {}
        for outcome in self.of("refused"):
            key = (outcome.kernel, outcome.reason)
            found[key] = found.get(key, 0) + 1
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def make_report(
    outcomes: Iterable[Outcome], backends: Mapping[str, Backend], device: str, notes: Iterable[str] = ()
) -> Report:
    """A report of now, with the versions of what took part."""
    import torch

    from kernelmux import __version__

    judged = tuple(outcomes)
    taking_part = dict.fromkeys(outcome.kernel.partition(":")[0] for outcome in judged)
    versions = {
        "kernelmux": __version__,
        **{f"backend {name}": backends[name].version for name in taking_part if name in backends},
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }
    made = datetime.now(UTC).isoformat(sep=" ", timespec="minutes").replace("+00:00", " UTC")
    return Report(judged, device, versions, made, tuple(notes))


def count(outcomes: Iterable[Outcome]) -> dict[Status, int]:
    """How many outcomes have each status, the worst first."""
    counts = dict.fromkeys(SIGNS, 0)
    for outcome in outcomes:
        counts[outcome.status] += 1
    return counts


def summary(counts: Mapping[Status, int]) -> str:
    """`12 pass, 3 refused, 0 fail, 0 known`."""
    return ", ".join(f"{counts[status]} {status}" for status in ("pass", "refused", "fail", "known"))


def to_json(report: Report) -> dict[str, Any]:
    """Everything, for a script; an error that is not finite is null, and `failures` says what it is."""
    return {
        "device": report.device,
        "versions": dict(report.versions),
        "made": report.made,
        "backends": list(report.backends),
        "notes": list(report.notes),
        "totals": dict(report.totals),
        "matrix": [
            {
                "op": cell.op,
                "weight_format": cell.weight_format,
                "kernel": cell.kernel,
                **cell.counts,
                "worst": _numbers(cell.worst) if cell.worst else None,
                "reasons": list(cell.reasons),
                "batch_invariant": cell.batch_invariant,
            }
            for cell in report.cells
        ],
        "outcomes": [{**o.to_dict(), **_numbers(o), "command": o.command} for o in report.outcomes],
    }


def _numbers(outcome: Outcome) -> dict[str, Any]:
    found = {"error": outcome.error, "worst": outcome.worst, "bound": outcome.bound}
    finite = {key: value if value is not None and math.isfinite(value) else None for key, value in found.items()}
    return {"case": outcome.case, **finite}


def to_markdown(report: Report) -> str:
    """The matrix and the refusals, with counts and bounds only: the same on every machine where the same passes.

    Kernels are in the order of their names: which one a backend offers first is the machine's.
    """
    lines = []
    for backend, offered, rows in _matrices(report):
        kernels = sorted(offered)
        head = ["op", "weight", *(f"`{kernel}`" for kernel in kernels)]
        lines += [f"### {backend}", "", _row(head), "|" + "---|" * len(head)]
        for (op, weight), cells in rows.items():
            bounds = {k: f" ({c.bound:.2g})" if c.bound is not None else "" for k, c in cells.items()}
            found = [cells[k].text + bounds[k] if k in cells else "" for k in kernels]
            lines.append(_row([op, weight, *found]))
        refusals = sorted((kernel, why, n) for (kernel, why), n in report.refusals.items() if kernel in kernels)
        if refusals:
            lines += ["", _row(["kernel", "refused", "reason"]), "|---|---|---|"]
            lines += [_row([f"`{kernel}`", str(n), why]) for kernel, why, n in refusals]
        lines.append("")
    lines += [f"- {o.kernel}, {o.case}: {'; '.join(o.failures)}" for o in report.of("fail")]
    lines += [f"- {o.kernel}, {o.case}, known: {o.reason}" for o in report.of("known")]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


Rows = Mapping[tuple[str, str], Mapping[str, Cell]]


def _matrices(report: Report) -> Iterator[tuple[str, list[str], Rows]]:
    """A matrix a backend: its name, its kernels, and by op and weight format its cells by kernel."""
    for backend in report.backends:
        rows: dict[tuple[str, str], dict[str, Cell]] = {}
        for cell in report.cells:
            if cell.kernel.partition(":")[0] == backend:
                rows.setdefault((cell.op or "known_failures.toml", cell.weight_format), {})[cell.kernel] = cell
        yield backend, list(dict.fromkeys(kernel for cells in rows.values() for kernel in cells)), rows


def print_report(report: Report, traces: bool = False) -> None:
    """The matrix, the refusals, each failure with what runs it again, and the totals; plain lines to a pipe or file.

    With `traces` also the traceback of each kernel that raised.
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        _draw(report, console)
    else:
        for line in _plain_matrix(report):
            print(line)
    for outcome in report.of("known"):
        console.print(f"known: {outcome.kernel} {outcome.case}: {outcome.reason}", soft_wrap=True)
    for outcome in report.of("fail"):
        console.print(f"\nfail: {outcome.kernel} {outcome.case}", style=COLOURS["fail"], soft_wrap=True)
        for failure in outcome.failures:
            console.print(f"  {failure}", soft_wrap=True)
        console.print(f"  again: {outcome.command}", soft_wrap=True)
        if traces and outcome.trace:
            console.print(outcome.trace, soft_wrap=True)
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    console.print(f"\n{summary(report.totals)}; on {report.device}, {versions}", soft_wrap=True)


def _plain_matrix(report: Report) -> Iterator[str]:
    """Tab-separated: a line a cell, with its worst case; then a line a reason of refusals."""
    yield "\t".join(("op", "weight", "kernel", *SIGNS, "worst case", "error", "bound"))
    for cell in report.cells:
        worst = ("", "", "")
        if cell.worst:
            worst = (cell.worst.case, f"{cell.worst.error:.3g}", f"{cell.worst.bound:.3g}")
        yield "\t".join((cell.op, cell.weight_format, cell.kernel, *map(str, cell.counts.values()), *worst))
    for (kernel, reason), number in report.refusals.items():
        yield f"refused\t{kernel}\t{number}\t{' '.join(reason.split())}"


def _draw(report: Report, console: Console) -> None:
    """A coloured table a backend, the worst case of each kernel, and the refusals."""
    from rich.table import Table
    from rich.text import Text

    style: dict[str, Any] = {"box": None, "pad_edge": False, "header_style": "bold", "title_justify": "left"}
    for backend, kernels, rows in _matrices(report):
        table = Table("op", "weight", *(kernel.partition(":")[2] for kernel in kernels), title=backend, **style)
        for (op, weight), cells in rows.items():
            found = [Text(cells[k].text, COLOURS[cells[k].status]) if k in cells else "" for k in kernels]
            table.add_row(op, weight, *found)
        console.print(table, "")
    measured = [outcome for outcome in report.outcomes if outcome.error is not None]
    table = Table("kernel", "worst case", "error", "bound", **style)
    for kernel in dict.fromkeys(outcome.kernel for outcome in measured):
        worst = max((outcome for outcome in measured if outcome.kernel == kernel), key=share)
        table.add_row(kernel, worst.case, f"{worst.error:.3g}", f"{worst.bound:.3g}")
    console.print(table, "")
    if report.refusals:
        table = Table("kernel", "refused", "reason", **style)
        for (kernel, reason), number in report.refusals.items():
            table.add_row(kernel, str(number), reason)
        console.print(table, "")
