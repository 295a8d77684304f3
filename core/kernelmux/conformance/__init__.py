"""The conformance suite: any kernel on the ops' named cases, held against float64 and checked for what it touches.

Enters: a backend's name. Leaves: an Outcome a case, a matrix, a report. A third party hooks its backend up with one
line in one test file:

    TestHello = kernelmux.conformance.suite("hello")

pytest imports this package in every project, for its plugin: torch comes with the first name that is asked for.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernelmux.conformance.outcome import Outcome
    from kernelmux.conformance.run import Variant, run_case
    from kernelmux.conformance.suite import Filter, Job, jobs, suite

__all__ = ["Filter", "Job", "Outcome", "Variant", "jobs", "run_case", "suite"]

_HOMES = {"Outcome": "outcome", "Variant": "run", "run_case": "run", "Filter": "suite", "Job": "suite", "jobs": "suite"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """Keeps `suite` the function, where importing the module of that name would put the module in its place."""

    @property
    def suite(self) -> Any:
        return import_module(f"{__name__}.suite").suite

    @suite.setter
    def suite(self, module: ModuleType) -> None: ...


sys.modules[__name__].__class__ = _Package
