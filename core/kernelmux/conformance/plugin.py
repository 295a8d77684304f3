"""The pytest plugin: options for the tests that `suite(...)` makes, and what came of them as one line, JSON or HTML.

pytest loads this module in every project of the environment, so it imports nothing until such a test has run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kernelmux.conformance import Job
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
    config.addinivalue_line("markers", "drawn: a case of a kernelmux suite that was drawn from its op's domain")
    config.pluginmanager.register(_Results(config), "kernelmux-results")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the suites' tests only those of the cases asked for; other tests stay."""
    wanted = config.getoption("kernelmux_case")
    jobs = {item: job for item in items if (job := _job_of(item))}
    if not wanted or not jobs:
        return
    from kernelmux.conformance.hookup import Filter, choose
    from kernelmux.errors import nearest

    chosen = set(choose(jobs.values(), Filter(case=wanted, large=True)))
    if not chosen:
        close = nearest(wanted, {job.name for job in jobs.values()}).partition(";")[0]
        raise pytest.UsageError(f"--kernelmux-case: no case matches {wanted!r}{close}")
    config.hook.pytest_deselected(items=[item for item, job in jobs.items() if job not in chosen])
    items[:] = [item for item in items if item not in jobs or jobs[item] in chosen]


def _job_of(item: pytest.Item) -> Job | None:
    """The job of a test made by `suite`; None for any other test."""
    callspec = getattr(item, "callspec", None)
    job = callspec.params.get("job") if callspec else None
    return job if type(job).__module__.startswith("kernelmux.conformance.") else None


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

        outcomes = [Outcome(**found) for found in self.found]
        devices = dict.fromkeys(outcome.device for outcome in outcomes)
        return make_report(outcomes, registry.current().backends, ", ".join(devices))

    def _write(self, report: Report) -> Iterator[Path]:
        from kernelmux.conformance.html import to_html
        from kernelmux.conformance.report import to_json
        from kernelmux.files import write_whole
        from kernelmux.measure.report import save_report

        savers: dict[str, Callable[[Path], object]] = {
            "kernelmux_json": lambda path: save_report(to_json(report), path),
            "kernelmux_html": lambda path: write_whole(path, to_html(report)),
        }
        for option, save in savers.items():
            if path := self.config.getoption(option):
                path.parent.mkdir(parents=True, exist_ok=True)
                save(path)
                yield path
