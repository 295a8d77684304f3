"""What commands have saved of a model on a machine, as one page that needs nothing beside itself.

Enters: a folder with the JSON that `--save` and `--json` give: of check, plan, compare, bisect, bench, trace. Leaves:
HTML with a section for each, tables and plots. What a document is is told by its keys; the page says which it left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kernelmux.errors import KernelmuxError
from kernelmux.measure.predict import human_time
from kernelmux.page import render_page

LARGEST = 64 << 20
"""Bytes of a document."""
SHOWN = 40
"""Rows of a table; the worst, or the first."""


@dataclass(frozen=True)
class Bar:
    """One bar of a plot: what it is of, how long it is (from 0 to 1), and what is written at its end."""

    label: str
    share: float
    value: str


@dataclass(frozen=True)
class Section:
    """A document as the page tells it."""

    title: str
    source: str
    """The file."""
    facts: Sequence[tuple[str, str]] = ()
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    left_out: int = 0
    """Rows beyond those shown."""
    bars: Sequence[Bar] = ()
    bars_title: str = ""
    good: bool | None = None
    """Whether all is well; None where that is no question."""


Tell = Callable[[Mapping[str, Any], str], Section | list[Section]]
"""What makes parts of a document, which is in a file of that name."""


def report_page(folder: Path) -> str:
    """The page; every text in it is escaped. KernelmuxError where the folder has no document that is known."""
    sections, unknown = list[Section](), list[str]()
    for path in documents(folder):
        document = _read(path)
        told = next((tell(document, path.name) for fits, tell in _KINDS if fits(document)), None)
        if told is None:
            unknown.append(path.name)
        else:
            sections += [told] if isinstance(told, Section) else told
    if not sections:
        known = "check, plan, compare, bisect, bench and trace save such with --save, or print them with --json"
        raise KernelmuxError(f"{folder}: has no document that a page can be made of; {known}", file=str(folder))
    numbered = [(f"part-{number}", section) for number, section in enumerate(sections, 1)]
    name = folder.resolve().name
    return render_page("kernelmux.debug", "report.html.jinja", {}, folder=name, sections=numbered, unknown=unknown)


def documents(folder: Path) -> list[Path]:
    """The files of a folder that a page may be made of; KernelmuxError where there is no such folder."""
    if not folder.is_dir():
        raise KernelmuxError(f"{folder}: no such folder", file=str(folder))
    return sorted(path for path in folder.glob("*.json") if path.is_file() and path.stat().st_size <= LARGEST)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _conformance(document: Mapping[str, Any], name: str) -> Section:
    totals = document["totals"]
    cells = [cell for cell in document["matrix"] if cell.get("pass") or cell.get("fail") or cell.get("known")]
    cells.sort(key=lambda cell: (-cell.get("fail", 0), cell["op"], cell["kernel"]))
    told, counted = ("op", "weight_format", "kernel"), ("pass", "fail", "known")
    rows = [[*(cell[key] for key in told), *(str(cell.get(key, 0)) for key in counted)] for cell in cells]
    facts = [("device", document["device"]), ("made", document["made"]), *_items(totals), *_items(document["versions"])]
    headings = ("op", "weight", "kernel", "pass", "fail", "known")
    return _table(f"Conformance of {', '.join(document['backends'])}", name, facts, headings, rows, not totals["fail"])


def _choice(document: Mapping[str, Any], name: str) -> Section:
    kernels: dict[tuple[str, str], int] = {}
    for node in document["nodes"]:
        key = node["op"], node["kernel"]
        kernels[key] = kernels.get(key, 0) + 1
    rows = [(op, kernel, str(count)) for (op, kernel), count in sorted(kernels.items(), key=lambda item: -item[1])]
    told = ("graph", "device", "policy", "fingerprint", "rows", "launches")
    facts = [(key, str(document[key])) for key in told]
    return _table(f"Choice at {document['rows']} rows", name, facts, ("op", "kernel", "nodes"), rows, None)


def _accuracy(document: Mapping[str, Any], name: str) -> Section:
    tokens, (first, second) = document["tokens"], document["plans"]
    text, position, nats = tokens["worst"]
    facts = [
        ("model", document["model"]),
        ("device", second["device"]),
        ("tokens", str(tokens["tokens"])),
        ("divergence", f"{_number(tokens['divergence'])} nats a token"),
        ("worst", f"{_number(nats)} after token {position + 1} of text {text + 1}"),
        ("likeliest the same", f"{100 * tokens['agreement']:.2f} %"),
    ]
    for plan, told in zip((first, second), tokens["perplexity"], strict=True):
        facts.append((f"perplexity, {plan['asked']}", _interval(told)))
    if (parting := tokens["parting"]) is not None:
        facts.append(("they part first", f"after token {parting['position'] + 1}"))
    compared = [node for node in document["nodes"] if node["own"] is not None]
    nodes = sorted(compared, key=lambda node: -_size(node["own"]))
    rows = [
        (
            *(str(node[key]) for key in ("node", "op", "kernel")),
            *(_number(node[key]) for key in ("own", "stated", "gathered")),
            "" if node["row"] is None else str(node["row"]),
            "" if node["head"] is None else str(node["head"]),
        )
        for node in nodes
    ]
    headings = ("node", "op", "kernel", "own error", "stated", "gathered", "row", "head")
    title = f"{second['asked']} held against {first['asked']}"
    section = _table(title, name, facts, headings, rows, None)
    layers: dict[str, float] = {}
    for node in document["nodes"]:
        if node["gathered"] is not None:
            key = "outside layers" if node["layer"] is None else f"layer {node['layer']}"
            layers[key] = max(layers.get(key, 0.0), _size(node["gathered"]))
    return _with_bars(section, "Error that has gathered, the worst node of each layer (decades)", _decades(layers))


def _blame(document: Mapping[str, Any], name: str) -> Section:
    within = document["error"] is not None and document["error"] <= document["bound"]
    facts = [
        ("error", f"{_number(document['error'])} after token {document['position'] + 1}"),
        ("bound", _number(document["bound"])),
        ("without those to blame", _number(document["healed"])),
        ("runs", str(document["runs"])),
    ]
    rows = [
        (who["kernel"], who["node"], who["op"], "{} to {}".format(*who["rows"]), kind)
        for kind, several in (("to blame", document["blamed"]), ("only beside", document["accomplices"]))
        for who in several
    ]
    title = "Nothing is wrong" if within else "Who is to blame"
    return _table(title, name, facts, ("kernel", "node", "op", "rows", ""), rows, within)


def _steps(document: Mapping[str, Any], name: str) -> list[Section]:
    """Of a trace a part for each kind of step: what each op takes, and what a better kernel could gain at most."""
    return [_step(document, step, name) for step in document["steps"]]


def _step(document: Mapping[str, Any], step: Mapping[str, Any], name: str) -> Section:
    ops = step["by_op"]
    facts = [
        *((key, str(document[key])) for key in ("model", "device", "policy", "fingerprint")),
        ("a step as it is run", human_time(step["step"]["median"])),
        ("its nodes one by one", human_time(step["us"])),
    ]
    rows = [
        [
            *(str(group[key]) for key in ("name", "count")),
            human_time(group["us"]),
            *(f"{100 * group[key]:.1f} %" for key in ("share", "ceiling")),
            str(group["bound"]),
            f"{100 * group['gain']:.1f} %",
        ]
        for group in ops
    ]
    headings = ("op", "nodes", "time", "of the step", "of the ceiling", "bound by", "a better kernel gains at most")
    section = _table(f"Where the time goes: {step['work']}", name, facts, headings, rows, None)
    largest = max((group["share"] for group in ops), default=0.0) or 1.0
    bars = [Bar(group["name"], group["share"] / largest, f"{100 * group['share']:.1f} %") for group in ops]
    return _with_bars(section, "Share of the step", bars)


def _measured(document: Mapping[str, Any], name: str) -> Section:
    """Anything with a title and rows, as bench and trace give."""
    entries = document["rows"]
    headings = list(dict.fromkeys(key for row in entries for key in row))
    rows = [[_cell(row.get(key)) for key in headings] for row in entries]
    told = ("machine", "commit", "date", "method")
    facts = [(key, str(document[key])) for key in told if document.get(key)]
    facts += [("note", str(note)) for note in document.get("notes", ())]
    section = _table(str(document["title"]), name, facts, headings, rows, None)
    numbers = [key for key in headings if all(isinstance(row.get(key), int | float) for row in entries)]
    if not numbers or len(entries) < 2:
        return section
    labels = [" ".join(_cell(row[key]) for key in headings if isinstance(row.get(key), str))[:60] for row in entries]
    largest = max(abs(row[numbers[0]]) for row in entries) or 1.0
    values = [row[numbers[0]] for row in entries]
    bars = [Bar(label, abs(value) / largest, _cell(value)) for label, value in zip(labels, values, strict=True)]
    return _with_bars(section, numbers[0], bars[:SHOWN])


_KINDS: Sequence[tuple[Callable[[Mapping[str, Any]], bool], Tell]] = (
    (lambda d: {"matrix", "totals", "outcomes"} <= d.keys(), _conformance),
    (lambda d: {"fingerprint", "graph", "nodes", "launches"} <= d.keys(), _choice),
    (lambda d: {"plans", "tokens", "nodes"} <= d.keys(), _accuracy),
    (lambda d: {"blamed", "accomplices", "bound"} <= d.keys(), _blame),
    (lambda d: {"steps", "ceilings", "model"} <= d.keys(), _steps),
    (lambda d: isinstance(d.get("rows"), list) and "title" in d, _measured),
)
"""Kinds of documents, the narrower first: what tells one, and who tells of it."""


def _table(
    title: str,
    source: str,
    facts: Iterable[tuple[str, str]],
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    good: bool | None,
) -> Section:
    return Section(title, source, list(facts), headings, rows[:SHOWN], max(len(rows) - SHOWN, 0), good=good)


def _with_bars(section: Section, title: str, bars: Sequence[Bar]) -> Section:
    return replace(section, bars=bars, bars_title=title)


def _decades(values: Mapping[str, float]) -> list[Bar]:
    """Bars by the logarithm, from a decade below the least that is not 0."""
    finite = [value for value in values.values() if 0 < value < math.inf]
    if not finite:
        return []
    low, high = math.log10(min(finite)) - 1, max(math.log10(max(finite)), math.log10(min(finite)) + 1e-9)
    shares = {
        label: 1.0 if value == math.inf else (math.log10(value) - low) / (high - low) if value else 0.0
        for label, value in values.items()
    }
    return [Bar(label, shares[label], _number(value)) for label, value in values.items()]


def _items(mapping: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(key), str(value)) for key, value in mapping.items()]


def _interval(told: Mapping[str, Any]) -> str:
    return "{} ({} to {})".format(*(_number(told[key]) for key in ("mean", "low", "high")))


def _size(value: float) -> float:
    return math.inf if math.isnan(value) else abs(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return "" if value is None else str(value)
