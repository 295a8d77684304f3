"""The conformance suite: any kernel on the ops' named cases, held against float64 and checked for what it touches.

Enters: a backend's name. Leaves: an Outcome a case, a matrix, a report. A third party hooks its backend up with one
line in one test file:

    TestHello = kernelmux.conformance.suite("hello")

pytest imports this package in every project, for its plugin: torch comes with the first name that is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernelmux.conformance.hookup import Filter, Job, jobs, suite
    from kernelmux.conformance.outcome import Outcome
    from kernelmux.conformance.run import Variant, run_case

__all__ = ["Filter", "Job", "Outcome", "Variant", "jobs", "run_case", "suite"]

_HOMES = {
    "Outcome": "outcome",
    "Variant": "run",
    "run_case": "run",
    "Filter": "hookup",
    "Job": "hookup",
    "jobs": "hookup",
    "suite": "hookup",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
