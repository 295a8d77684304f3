"""Questions answered one by one, each kernel's smoke cases before its first; what fails is told and left out.

Enters: questions, a worker, a time to stop at. Leaves: answers, as they come, and what was left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kernelmux.contract.kernel import Kernel
from kernelmux.measure.timing import Timing
from kernelmux.tune.questions import Question
from kernelmux.tune.worker import Answer, SmokeCases, Task, Timed
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

    A failure goes on record as one of smoke cases does: `auto` does not take the kernel for that op either. Times of
    one work are kept together, and none of them that vary too much.
    """
    found, checked, together = Measured(), set[str](), _Together(keep)
    progress.begin(len(questions), "kernels")
    for done, question in enumerate(questions):
        if until is not None and time.monotonic() > until:
            found.left = len(questions) - done
            together.drop()
            break
        op, kernel = question.work.node.op, question.kernel
        progress.advance(done, f"{kernel} {question.work.label}, m = {question.work.m}")
        together.begin(question)
        if question.subject in found.faults:
            continue
        if question.subject not in checked:
            checked.add(question.subject)
            if fault := _smoke_fault(op, kernel, worker, smoke):
                found.faults[question.subject] = fault
                progress.tell(f"{question.subject} is left out: {fault}")
                continue
        task = Timed(question.work, kernel, variants and question.variants)
        answer = _asked(worker, task)
        if not answer.fault and _is_unsteady(answer.value[0]):
            # Something else was running: once more.
            answer = worker.ask(task)
        if answer.fault:
            smoke.note(op, kernel, answer.fault)
            found.faults[question.subject] = answer.fault
            progress.tell(f"{question.subject} is left out: {answer.fault}")
            continue
        timing, variant, work = answer.value
        found.answered += 1
        found.unsteady += _is_unsteady(timing)
        together.add(question, timing, variant, work)
    together.flush()
    progress.advance(len(questions) - found.left, "")
    return found


def _is_unsteady(timing: Timing) -> bool:
    return timing.p90 > UNSTEADY * timing.p10


@dataclass
class _Together:
    """Keeps the times of all kernels of one work, or none: beside what others declare, or that varies, one misleads."""

    keep: Keep
    _about: tuple[object, ...] = ()
    _held: list[tuple[Question, float, str, str]] = field(default_factory=list)
    _steady: bool = True

    def begin(self, question: Question) -> None:
        """A question comes next: what was held is kept where it is about another work."""
        about = question.work.node.op, question.work.node.name, question.work.m
        if about != self._about:
            self.flush()
            self._about = about

    def add(self, question: Question, timing: Timing, variant: str, work: str) -> None:
        """Holds an answer."""
        self._held.append((question, timing.median, variant, work))
        self._steady = self._steady and not _is_unsteady(timing)

    def drop(self) -> None:
        """Forgets what is held."""
        self._held, self._steady = [], True

    def flush(self) -> None:
        """Keeps what is held."""
        if self._steady:
            for answer in self._held:
                self.keep(*answer)
        self.drop()


def _asked(worker: Worker, task: Task) -> Answer:
    """The answer to a task; what hangs does so twice.

    It goes on record for good, and a machine that was busy, asleep, or compiling for the first time is no fault of it.
    """
    answer = worker.ask(task)
    return worker.ask(task) if answer.hung else answer


def _smoke_fault(op: str, kernel: str, worker: Worker, smoke: Smoke) -> str:
    """Why a kernel is not to be trusted; its smoke cases run unless they are known to have passed."""
    if smoke.passed(op, kernel):
        return ""
    answer = _asked(worker, SmokeCases(op, kernel))
    if answer.fault:
        smoke.note(op, kernel, answer.fault)
        return f"its smoke cases: {answer.fault}"
    case, failure = answer.value or ("", "")
    smoke.note(op, kernel, case)
    return f"smoke case {case}: {failure}" if case else ""
