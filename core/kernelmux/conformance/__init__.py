"""The conformance suite: any kernel on the ops' named cases, held against float64 and checked for what it touches.

Enters: a backend's name. Leaves: an Outcome a case, a matrix, a report. A third party hooks its backend up with one
line in one test file:

    TestHello = kernelmux.conformance.suite("hello")
"""

from __future__ import annotations

from kernelmux.conformance.outcome import Outcome
from kernelmux.conformance.run import Variant, run_case
from kernelmux.conformance.suite import Filter, Job, jobs, suite

__all__ = ["Filter", "Job", "Outcome", "Variant", "jobs", "run_case", "suite"]
