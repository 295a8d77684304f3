"""Questions answered one by one, each kernel's smoke cases before its first; what fails is told and left out.

Enters: questions, a worker, a time to stop at. Leaves: answers, as they come, and what was left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kernelmux.contract.kernel import Kernel
from kernelmux.tune.questions import Question
from kernelmux.tune.worker import SmokeCases, Timed
from kernelmux.tune.workers import Worker

UNSTEADY = 2.0
"""Where nine tenths of the samples take so many times as long as one tenth, a time is not to be relied on."""


class Progress(Protocol):
    """Whoever shows how far measuring is."""

    def begin(self, total: int, what: str) -> None:
        """A stage of so many things begins."""

    def advance(self, done: int, now: str) -> None:
        """So many are done, and what is asked now."""

    def tell(self, line: str) -> None:
        """Something to know at once."""


class Smoke(Protocol):
    """The record of smoke cases on this machine."""

    def passed(self, op: str, name: str) -> bool:
        """Whether they are known to have passed."""

    def failure(self, op: str, name: str, kernel: Kernel) -> str:
        """Why a kernel is known to have failed; nothing where it is not."""

    def note(self, op: str, name: str, case: str) -> None:
        """What came of them: the case that failed; an empty one where all passed."""


Keep = Callable[[Question, float, str, str], object]
"""Keeps an answer: microseconds, the fastest variant and its work where variants were tried."""


@dataclass
class Measured:
    """What came of measuring."""

    answered: int = 0
    faults: dict[str, str] = field(default_factory=dict)
    """By op and kernel why it is left out."""
    left: int = 0
    """Questions for which there was no time."""
    unsteady: int = 0
    """Answers that vary too much: something else kept the device busy."""


def measure(
    questions: Sequence[Question],
    worker: Worker,
    keep: Keep,
    smoke: Smoke,
    progress: Progress,
    variants: bool = False,
    until: float | None = None,
) -> Measured:
    """Asks until all is answered, or until a time of `time.monotonic()`; who failed once is not asked again.

    A failure goes on record as one of smoke cases does: `auto` does not take the kernel for that op either.
    """
    found, checked = Measured(), set[str]()
    progress.begin(len(questions), "kernels")
    for done, question in enumerate(questions):
        if until is not None and time.monotonic() > until:
            found.left = len(questions) - done
            break
        op, kernel = question.work.node.op, question.kernel
        progress.advance(done, f"{kernel} {question.work.label}, m = {question.work.m}")
        if question.subject in found.faults:
            continue
        if question.subject not in checked:
            checked.add(question.subject)
            if fault := _smoke_fault(op, kernel, worker, smoke):
                found.faults[question.subject] = fault
                progress.tell(f"{question.subject} is left out: {fault}")
                continue
        answer = worker.ask(Timed(question.work, kernel, variants and question.variants))
        if answer.fault:
            smoke.note(op, kernel, answer.fault)
            found.faults[question.subject] = answer.fault
            progress.tell(f"{question.subject} is left out: {answer.fault}")
            continue
        timing, variant, work = answer.value
        keep(question, timing.median, variant, work)
        found.answered += 1
        found.unsteady += timing.p90 > UNSTEADY * timing.p10
    progress.advance(len(questions) - found.left, "")
    return found


def _smoke_fault(op: str, kernel: str, worker: Worker, smoke: Smoke) -> str:
    """Why a kernel is not to be trusted; its smoke cases run unless they are known to have passed."""
    if smoke.passed(op, kernel):
        return ""
    answer = worker.ask(SmokeCases(op, kernel))
    if answer.fault:
        smoke.note(op, kernel, answer.fault)
        return f"its smoke cases: {answer.fault}"
    case, failure = answer.value or ("", "")
    smoke.note(op, kernel, case)
    return f"smoke case {case}: {failure}" if case else ""
