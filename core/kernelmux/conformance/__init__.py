"""The conformance suite: any kernel on the ops' named cases, held against float64 and checked for what it touches.

Enters: a backend's name. Leaves: an Outcome a case, a matrix, a report. A third party hooks its backend up with one
line in one test file:

    TestHello = kernelmux.conformance.suite("hello")

pytest imports this package in every project, for its plugin: torch comes with the first name that is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernelmux.conformance.hookup import Filter, Job, jobs, suite
    from kernelmux.conformance.outcome import Outcome
    from kernelmux.conformance.run import Variant, run_case

__all__ = ["Filter", "Job", "Outcome", "Variant", "jobs", "run_case", "suite"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        # It comes after the others, and has their names too.
        from kernelmux.conformance import hookup

        return getattr(hookup, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
