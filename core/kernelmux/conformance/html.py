"""A report as one HTML page that needs nothing beside itself: to read, to print, to attach to a release."""

from __future__ import annotations

from collections.abc import Mapping

from kernelmux.conformance.outcome import share
from kernelmux.conformance.report import SIGNS, Cell, Report, grouped
from kernelmux.page import render_page


def to_html(report: Report) -> str:
    """The page; every text in it is escaped."""
    failures = grouped(report.of("fail"), lambda outcome: (outcome.kernel, outcome.op))
    reasons = grouped(report.of("refused"), lambda outcome: outcome.reason)
    return render_page(
        "kernelmux.conformance",
        "report.html.jinja",
        {"share": share, "number": _number, "percent": _percent},
        report=report,
        signs=SIGNS,
        kernels=grouped(dict.fromkeys(cell.kernel for cell in report.cells), lambda kernel: kernel.partition(":")[0]),
        ops=_by_op(report.cells),
        ids={(cell.op, cell.weight_format, cell.kernel): f"cell-{i}" for i, cell in enumerate(report.cells)},
        failures=failures,
        failure_ids={group: f"failures-{i}" for i, group in enumerate(failures)},
        # The most frequent first: each kernel's refused cases.
        refusals={
            reason: grouped(reasons[reason], lambda outcome: outcome.kernel)
            for reason in sorted(reasons, key=lambda reason: -len(reasons[reason]))
        },
    )


def _by_op(cells: list[Cell]) -> Mapping[str, Mapping[str, Mapping[str, Cell]]]:
    """By op, then by weight format: the cells by kernel."""
    ops: dict[str, dict[str, dict[str, Cell]]] = {}
    for cell in cells:
        ops.setdefault(cell.op, {}).setdefault(cell.weight_format, {})[cell.kernel] = cell
    return ops


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _percent(part: float) -> str:
    """A share of a bound, as a person would say it."""
    if part > 1:
        return f"{part:.3g} times"
    return f"{part:.1%}" if part >= 0.001 else "under 0.1%" if part else "exact"
