"""The pytest plugin: options for the tests that `suite(...)` makes, and what came of them as one line, JSON or HTML.

pytest loads this module in every project of the environment, so it imports nothing until such a test has run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kernelmux.conformance.report import Report

PREFIX = "kernelmux_"
"""Of the properties by which a test carries its Outcome: into JUnit's XML, and from pytest-xdist's workers."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernelmux", "kernelmux conformance suites")
    group.addoption("--kernelmux-case", metavar="GLOB", default="", help="only the case of this name or pattern")
    group.addoption("--kernelmux-json", metavar="FILE", type=Path, help="write what the suites found as JSON")
    group.addoption("--kernelmux-html", metavar="FILE", type=Path, help="write what the suites found as a page to read")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "smoke: a case of a kernelmux suite that runs in a moment")
    config.pluginmanager.register(_Results(config), "kernelmux-results")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the suites' tests only those of the cases asked for; other tests stay."""
    wanted = config.getoption("kernelmux_case")
    names = {item: name for item in items if (name := _case_of(item))}
    if not wanted or not names:
        return
    chosen = _matching(wanted, set(names.values()))
    config.hook.pytest_deselected(items=[item for item, name in names.items() if name not in chosen])
    items[:] = [item for item in items if names.get(item, "") in {"", *chosen}]


def _case_of(item: pytest.Item) -> str:
    """The case of a test made by `suite`; empty for any other test."""
    callspec = getattr(item, "callspec", None)
    job: Any = callspec.params.get("job") if callspec else None
    return str(job.name) if type(job).__module__.startswith("kernelmux.conformance.") else ""


def _matching(wanted: str, names: set[str]) -> set[str]:
    """A name in full means that case alone; else a shell pattern. UsageError where nothing matches."""
    from fnmatch import fnmatchcase

    from kernelmux.errors import nearest

    chosen = {wanted} & names or {name for name in names if fnmatchcase(name, wanted)}
    if not chosen:
        raise pytest.UsageError(
            f"--kernelmux-case: no case matches {wanted!r}{nearest(wanted, names).partition(';')[0]}"
        )
    return chosen


class _Results:
    """Gathers the Outcomes that tests carry, in the process that reports."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.found: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            carried = {key: value for key, value in report.user_properties if key.startswith(PREFIX)}
            if carried:
                self.found.append({key.removeprefix(PREFIX): value for key, value in carried.items()})

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.found:
            from kernelmux.conformance.report import summary

            report = self._report()
            terminalreporter.section("kernelmux conformance")
            terminalreporter.line(f"{', '.join(report.backends)} on {report.device}: {summary(report.totals)}")
            for path in self._write(report):
                terminalreporter.line(f"written: {path}")

    def _report(self) -> Report:
        from kernelmux.conformance import Outcome
        from kernelmux.conformance.report import make_report
        from kernelmux.contract import registry

        fields = Outcome.__dataclass_fields__
        outcomes = [
            Outcome(**{key: value for key, value in carried.items() if key in fields}) for carried in self.found
        ]
        devices = dict.fromkeys(carried["device"] for carried in self.found)
        return make_report(outcomes, registry.current().backends, ", ".join(devices))

    def _write(self, report: Report) -> Iterator[Path]:
        from kernelmux.conformance.html import to_html
        from kernelmux.conformance.report import to_json

        makers = {"json": lambda made: json.dumps(to_json(made), indent=1, ensure_ascii=False) + "\n", "html": to_html}
        for kind, make in makers.items():
            path: Path | None = self.config.getoption(f"kernelmux_{kind}")
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(make(report), "utf-8")
                yield path
