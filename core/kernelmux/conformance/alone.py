"""Whether a failure is its case's own, or comes of the cases before it: told by running it again in a fresh process.

Enters: Outcomes of one run. Leaves: the same, where a failure goes away alone with a command that repeats it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import entry_points

from kernelmux.conformance.outcome import BEFORE, Outcome
from kernelmux.contract.installed import GROUP

MOST = 3
"""Failures of a kernel that are run again: a process takes seconds, and where so many fail alone the rest do too."""
SECONDS = 600.0
"""After which a process that runs them again is given up."""


def told_alone(outcomes: Iterable[Outcome]) -> tuple[list[Outcome], bool]:
    """Outcomes of cases that ran one after another in this process, the first failures of each kernel run again.

    And whether Ctrl-C ended that: the failures that are left stay as they were found.
    """
    found = list(outcomes)
    own: Counter[str] = Counter()
    for index, outcome in enumerate(found):
        if outcome.status == "fail" and outcome.op and own[outcome.kernel] < MOST:
            try:
                found[index] = tell_alone(outcome)
            except KeyboardInterrupt:
                return found, True
            own[outcome.kernel] += found[index] == outcome
    return found, False


def tell_alone(outcome: Outcome) -> Outcome:
    """A failure as it is where its case fails alone; else with what it takes to repeat it, the fewest cases before it.

    One of a backend that no entry point names, so that another process does not find it, is left as it is.
    """
    backend = outcome.kernel.partition(":")[0]
    if not any(entry.name == backend for entry in entry_points(group=GROUP)) or _fails(outcome) is not False:
        return outcome
    for before in BEFORE:
        if _fails(again := replace(outcome, before=before)):
            return replace(again, failures=("repeatable: it fails only after other cases", *outcome.failures))
    said = "repeatable: it failed once, and passes in a fresh process, alone and after other cases of its backend"
    return replace(outcome, failures=(said, *outcome.failures))


def _fails(outcome: Outcome) -> bool | None:
    """Whether the case fails where its command runs in a fresh process; None where that does not tell."""
    command = [sys.executable, "-m", *outcome.words, "--json"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        found = json.loads(ran.stdout)["outcomes"]
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError):
        return None
    mine = [one["status"] for one in found if (one["case"], one["kernel"]) == (outcome.case, outcome.kernel)]
    return "fail" in mine if mine else None
