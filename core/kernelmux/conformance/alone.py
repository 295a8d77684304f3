"""Whether a failure is its case's own, or comes of the cases before it: told by running it again in a fresh process.

Enters: Outcomes of one run. Leaves: the same, where a failure goes away alone with a command that repeats it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

from kernelmux.conformance.outcome import Before, Outcome
from kernelmux.conformance.run import running
from kernelmux.contract.installed import GROUP

MOST = 3
"""Failures of a kernel that are run again, of those that fail alone and of those that do not: a process takes seconds,
and where so many are alike the rest are too."""
SECONDS = 600.0
"""After which a process that runs one again is given up, unless told."""


class Again:
    """Runs failures again, the first of each kernel, and says of the others what came of those."""

    def __init__(self, seconds: float = SECONDS) -> None:
        """A process may take so many seconds."""
        self._seconds = seconds
        self._own: Counter[str] = Counter()
        self._later: dict[str, list[Outcome]] = {}

    def tell(self, outcome: Outcome) -> Outcome:
        """An outcome as it is, or, where it is a failure that goes away alone, with what that takes."""
        if outcome.status != "fail" or not outcome.op or self._own[outcome.kernel] >= MOST:
            return outcome
        later = self._later.setdefault(outcome.kernel, [])
        if len(later) >= MOST:
            said = f"it was not run again: {MOST} of this kernel before it pass alone"
            return _told(outcome.as_drawn or outcome, said, later[-1].before)
        found = tell_alone(outcome, self._seconds)
        if found in (outcome, outcome.as_drawn):
            self._own[outcome.kernel] += 1
        else:
            later.append(found)
        return found


def told_alone(
    outcomes: Iterable[Outcome], count: Callable[[str], None], seconds: float = SECONDS
) -> tuple[list[Outcome], bool]:
    """Outcomes of cases that ran one after another in this process, the first failures of each kernel run again.

    And whether Ctrl-C ended that: the failures that are left stay as they were found. `count` is told each failure, and
    a process may take so many seconds.
    """
    found, again = list(outcomes), Again(seconds)
    for index, outcome in enumerate(found):
        if outcome.status == "fail":
            try:
                found[index] = again.tell(outcome)
            except KeyboardInterrupt:
                return found, True
            count(f"{outcome.kernel} {outcome.op}")
    return found, False


def tell_alone(outcome: Outcome, seconds: float = SECONDS) -> Outcome:
    """A failure as it is where its case fails alone; else with what it takes to repeat it, the fewest cases before it.

    One that was made smaller in vain, as it passes alone, is told as it was drawn. One that another process does not
    find is left as it is: of a backend that no entry point names, or from a pipe.
    """
    backend = outcome.kernel.partition(":")[0]
    if not _installed(backend) or (outcome.cases and not Path(outcome.cases).is_file()):
        return outcome
    with running(f"{outcome.kernel} {outcome.case}, again in fresh processes,"):
        if _fails(outcome, seconds) is not False:
            return outcome
        if outcome.as_drawn:
            return tell_alone(outcome.as_drawn, seconds)
        tried: dict[str, bool | None] = {}
        for before in outcome.run.befores:
            again = replace(outcome, before=before)
            # All that ran may be what its backend was.
            if again.command not in tried:
                tried[again.command] = _fails(again, seconds)
            if tried[again.command]:
                return _told(outcome, "it fails only after other cases", before)
    after = (
        "; what it takes to repeat it is not known" if None in tried.values() else " and after those that ran before"
    )
    return _told(outcome, f"it failed once, and passes in a fresh process, alone{after}")


def _told(outcome: Outcome, said: str, before: Before = "") -> Outcome:
    return replace(outcome, before=before, failures=(f"repeatable: {said}", *outcome.failures))


def _installed(backend: str) -> bool:
    return any(entry.name == backend for entry in entry_points(group=GROUP))


def _fails(outcome: Outcome, seconds: float) -> bool | None:
    """Whether the case fails where its command runs in a fresh process; None where that does not tell."""
    command = [sys.executable, "-m", *outcome.words, "--json"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        found = json.loads(ran.stdout)["outcomes"]
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError):
        return None
    mine = [one["status"] for one in found if (one["case"], one["kernel"]) == (outcome.case, outcome.kernel)]
    return "fail" in mine if mine else None
