"""Sections of docs/performance.md about the choice: speeds beside every backend alone, predictions beside times.

Made of results that tests/bench/compare_choices.py writes, `docs/results/*-choice*.json`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scatter import Point, scatter
from tables import head, line, provenance

AUTO = "auto"
NOISE = 0.02
"""A loss that counts is larger."""
MEASURED = 0.9
"""Share of a predicted time from which on it counts as measured."""
PLOT = "results/prediction.svg"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """The rows of one model: by row count and plan."""

    model: str
    rows: Mapping[int, Mapping[str, Row]]

    @property
    def labels(self) -> list[str]:
        """The plans that ran somewhere: auto and the policies, then the backends alone."""
        ran = {label: row["alone"] for rows in self.rows.values() for label, row in rows.items() if "us" in row}
        return sorted(ran, key=lambda label: (ran[label], label != AUTO, label))

    @property
    def chosen(self) -> list[str]:
        """Those that choose: auto and the policies."""
        alone = {row["plan"] for rows in self.rows.values() for row in rows.values() if row["alone"]}
        return [label for label in self.labels if label not in alone]

    def us(self, label: str, m: int) -> float | None:
        """Microseconds of a step, where there are any."""
        found: float | None = self.rows[m].get(label, {}).get("us")
        return found

    def loss(self, label: str, m: int) -> float | None:
        """How much longer than the fastest backend alone that is as exact; None where there is none."""
        rivals = [row["us"] for row in self.rows[m].values() if row["alone"] and "us" in row and not row["less exact"]]
        own = self.us(label, m)
        return None if own is None or not rivals else own / min(rivals) - 1


def section(result: Mapping[str, Any]) -> str:
    """One result: how often a choice loses, then for each model speeds, choices, and what did not run."""
    method = f"{result['method'][0].upper()}{result['method'][1:]}"
    tables = _tables(result["rows"])
    lines = [f"## {result['title']}", "", f"{result['machine']}. {method}.", ""]
    lines += [
        "Tokens a second, the fastest in bold. What is marked * has kernels with more error than the default takes, "
        "and is no rival.",
        "",
        *(said for label in _choosing(tables) for said in (_summary(label, tables), "")),
    ]
    for table in tables:
        lines += [f"### {table.model}", "", *_speeds(table), "", *_choices(table), "", *_faults(table)]
    return "\n".join([*lines, *provenance(result)])


def predictions(results: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """The section about all results, and the picture that it shows; None where nothing was timed."""
    points = [point for result in results for point in _points(result)]
    if not points:
        return None
    lines = [
        "## Predicted and measured",
        "",
        "Whole steps by the default's plans, each model at every row count above.",
    ]
    for hollow, of in ((False, "measured kernels"), (True, "what kernels declare")):
        misses = [abs(point.predicted / point.measured - 1) for point in points if point.hollow == hollow]
        if misses:
            lines[-1] += f" Predicted from {of}: off by {statistics.median(misses):.0%} in the median of {len(misses)}."
    lines += ["", f"![Predicted against measured times of whole steps]({PLOT})", ""]
    return "\n".join(lines), scatter(points)


def _tables(rows: Sequence[Row]) -> list[Table]:
    found: dict[str, dict[int, dict[str, Row]]] = {}
    for row in rows:
        found.setdefault(row["model"], {}).setdefault(row["m"], {})[row["plan"]] = row
    return [Table(model, dict(sorted(rows.items()))) for model, rows in found.items()]


def _points(result: Mapping[str, Any]) -> Iterator[Point]:
    machine = result["machine"]
    place = "CPU" if "threads" in machine else machine.removeprefix("NVIDIA ").partition(" ")[0]
    for row in result["rows"]:
        if row["plan"] == AUTO and "us" in row:
            series, hollow = f"{row['model']}, {place}", row["measured"] < MEASURED
            yield Point(series, row["us"], row["predicted us"], hollow, f"{series}, m = {row['m']}")


def _choosing(tables: Sequence[Table]) -> list[str]:
    """What chooses in any of them."""
    return list(dict.fromkeys(label for table in tables for label in table.chosen))


def _summary(label: str, tables: Sequence[Table]) -> str:
    """How often one way of choosing loses, and where the most."""
    found = [(table.loss(label, m), table.model, m) for table in tables for m in table.rows]
    losses = [(loss, model, m) for loss, model, m in found if loss is not None]
    if not losses:
        return f"{label}: beside no other that is as exact."
    lost, (worst, model, m) = sum(loss > NOISE for loss, _, _ in losses), max(losses)
    usual = statistics.median(loss for loss, _, _ in losses)
    return (
        f"{label}: {lost} of {len(losses)} times slower than the fastest backend alone by more than {NOISE:.0%}, "
        f"at worst {_against(worst)} ({model}, m = {m}), in the median {_against(usual)}."
    )


def _speeds(table: Table) -> Iterator[str]:
    against = [f"{label} against the best alone" for label in table.chosen]
    yield from head(["m", *table.labels, *against])
    for m in table.rows:
        losses = (table.loss(label, m) for label in table.chosen)
        told = ("" if loss is None else _marked(_against(loss), loss > NOISE) for loss in losses)
        yield line([str(m), *(_speed(table, label, m) for label in table.labels), *told])


def _speed(table: Table, label: str, m: int) -> str:
    """Tokens a second, with its mark; nothing where it did not run."""
    row = table.rows[m].get(label, {})
    if "us" not in row:
        return ""
    exact = [each["us"] for each in table.rows[m].values() if "us" in each and not each["less exact"]]
    rate = f"{row['tokens/s']:,.{0 if row['tokens/s'] >= 100 else 1}f}"
    return f"{rate}*" if row["less exact"] else _marked(rate, row["us"] == min(exact))


def _choices(table: Table) -> Iterator[str]:
    yield from head(["m", *(f"{label}'s products" for label in table.chosen)])
    for m, rows in table.rows.items():
        yield line([str(m), *(rows.get(label, {}).get("choice", "") for label in table.chosen)])


def _faults(table: Table) -> Iterator[str]:
    """What did not run, and why."""
    found: dict[tuple[str, str], list[int]] = {}
    for m, rows in table.rows.items():
        for label, row in rows.items():
            if "fault" in row:
                found.setdefault((label, row["fault"]), []).append(m)
    for (label, fault), counts in found.items():
        where = "" if len(counts) == len(table.rows) else f" (m = {', '.join(map(str, counts))})"
        yield from (f"{label}: {fault}{where}.", "")


def _against(loss: float) -> str:
    """`12% faster`, of times: a step takes so much less, or more, than the other's."""
    percent = f"{abs(loss):.1%}" if abs(loss) < 0.0995 else f"{abs(loss):.0%}"
    return f"{percent} {'slower' if loss > 0 else 'faster'}"


def _marked(text: str, mark: bool) -> str:
    return f"**{text}**" if mark else text
