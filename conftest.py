"""Files `interpreted_*.py`, of tests whose Triton kernels run without a GPU: by themselves, under TRITON_INTERPRET=1.

Triton reads the variable as a kernel is made, so that a process interprets or compiles: `make test` compiles,
`make test-interpreted` interprets.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
NOTHING_PASSED: dict[str, bool] = {}
"""By file of interpreted tests that ran. One whose every case is refused is a success to pytest."""

if "PYTEST_XDIST_WORKER" in os.environ:
    # Beside each other, threads of several workers cost far more than they save. Read when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    if INTERPRETING and find_spec("triton") is None:
        pytest.exit("Triton, which interprets the kernels, is not installed", returncode=0)


def pytest_report_header() -> str:
    if INTERPRETING:
        return "Triton interprets: interpreted_*.py alone, as TRITON_INTERPRET is set"
    return "Triton compiles: without interpreted_*.py, which make test-interpreted runs"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of conformance suites the smoke cases are run by `make test`, all others by `make test-slow`."""
    for item in items:
        of_suite = item.path.name == "test_conformance.py" and "[" in item.name
        if of_suite and not item.get_closest_marker("smoke"):
            item.add_marker("slow")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """What this process cannot run; a file that is asked for by name says so itself."""
    foreign = collection_path.name.startswith("interpreted_") != INTERPRETING
    return True if foreign and collection_path.suffix == ".py" else None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file = report.location[0]
    if Path(file).name.startswith("interpreted_"):
        passed = report.when == "call" and report.passed
        NOTHING_PASSED[file] = NOTHING_PASSED.get(file, True) and not passed


def pytest_sessionfinish(session: pytest.Session) -> None:
    if any(NOTHING_PASSED.values()) and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for file in (file for file, nothing in NOTHING_PASSED.items() if nothing):
        terminalreporter.line(f"{file}: no test passed", red=True)
