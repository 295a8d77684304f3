"""What a run of the suite found, as a matrix of op, weight format and kernel.

Enters: Outcomes. Leaves: a Report, and from it JSON, Markdown, or text for a terminal; `html` makes a page of it.
"""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from kernelmux.conformance.outcome import Outcome, Status, share

if TYPE_CHECKING:
    from rich.table import Table

    from kernelmux.contract.registry import Backend

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)

SIGNS: Mapping[Status, str] = {"fail": "✗", "known": "!", "pass": "✓", "refused": "–"}
"""How each status is written where there is room for one sign; the worst first."""
COLOURS: Mapping[Status, str] = {"fail": "bold red", "known": "yellow", "pass": "green", "refused": "dim"}


@dataclass(frozen=True)
class Cell:
    """All cases of one op, with weights in one format, on one kernel."""

    op: str
    """Empty for stale entries of known failures, which belong to no case."""
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
        groups = grouped(self.outcomes, lambda outcome: (outcome.op, outcome.weight_format, outcome.kernel))
        ops, formats = (list(dict.fromkeys(key[part] for key in groups)) for part in (0, 1))
        keys = sorted(groups, key=lambda key: (ops.index(key[0]), formats.index(key[1])))
        return [Cell(*key, tuple(groups[key])) for key in keys]

    def of(self, status: Status) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == status]

    @property
    def refusals(self) -> Mapping[tuple[str, str], int]:
        """How many cases each kernel refused for each reason, the most frequent first."""
        return dict(Counter((outcome.kernel, outcome.reason) for outcome in self.of("refused")).most_common())


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Items by their key, in the order in which they come."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


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
    """How many cases came to each status, the worst first: outcomes, and those that are alike."""
    counts = dict.fromkeys(SIGNS, 0)
    for outcome in outcomes:
        counts[outcome.status] += 1 + outcome.alike
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
        "outcomes": [_whole(outcome) for outcome in report.outcomes],
    }


def _whole(outcome: Outcome) -> dict[str, Any]:
    found = {**asdict(replace(outcome, as_drawn=None)), **_numbers(outcome), "command": outcome.command}
    # The command says it.
    del found["run"]
    return {**found, "as_drawn": _whole(outcome.as_drawn) if outcome.as_drawn else None}


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
    for backend, found in grouped(report.cells, lambda cell: cell.kernel.partition(":")[0]).items():
        rows = grouped(found, lambda cell: (cell.op or "known failures", cell.weight_format))
        kernels = list(dict.fromkeys(cell.kernel for cell in found))
        yield backend, kernels, {row: {cell.kernel: cell for cell in cells} for row, cells in rows.items()}


def print_report(report: Report, traces: bool = False, file: TextIO | None = None) -> None:
    """The matrix, the refusals, each failure with what runs it again, and the totals; plain lines to a pipe or file.

    With `traces` also the traceback of each kernel that raised.
    """
    from rich.console import Console

    console = Console(file=file, highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        for table in _tables(report):
            console.print(table, "")
    else:
        for line in _plain_matrix(report):
            print(line, file=file)
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
        counts = map(str, cell.counts.values())
        yield "\t".join((cell.op, cell.weight_format, cell.kernel, *counts, *_worst(cell.worst)))
    for (kernel, reason), number in report.refusals.items():
        yield f"refused\t{kernel}\t{number}\t{' '.join(reason.split())}"


def _tables(report: Report) -> Iterator[Table]:
    """A coloured table a backend, the worst case of each kernel, and the refusals."""
    from rich.table import Table
    from rich.text import Text

    def table(headings: Iterable[str], rows: Iterable[Iterable[Text | str]], title: str | None = None) -> Table:
        made = Table(*headings, title=title, box=None, pad_edge=False, header_style="bold", title_justify="left")
        for row in rows:
            made.add_row(*row)
        return made

    for backend, kernels, rows in _matrices(report):
        coloured = {
            row: [Text(cells[k].text, COLOURS[cells[k].status]) if k in cells else "" for k in kernels]
            for row, cells in rows.items()
        }
        headings = ["op", "weight", *(kernel.partition(":")[2] for kernel in kernels)]
        yield table(headings, ([*row, *cells] for row, cells in coloured.items()), backend)
    measured = grouped((o for o in report.outcomes if o.error is not None), lambda outcome: outcome.kernel)
    worst = [max(outcomes, key=share) for outcomes in measured.values()]
    yield table(["kernel", "worst case", "error", "bound"], ([outcome.kernel, *_worst(outcome)] for outcome in worst))
    if report.refusals:
        refusals = ([kernel, str(number), reason] for (kernel, reason), number in report.refusals.items())
        yield table(["kernel", "refused", "reason"], refusals)


def _worst(outcome: Outcome | None) -> tuple[str, str, str]:
    """A measured case, its error and its bound."""
    return (outcome.case, f"{outcome.error:.3g}", f"{outcome.bound:.3g}") if outcome else ("", "", "")
