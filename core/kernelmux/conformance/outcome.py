"""What came of one case on one kernel."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import Literal

Status = Literal["pass", "fail", "refused", "known"]
Before = Literal["", "op", "kernel", "backend", "run"]
"""Whose cases a failure may take to come: those of its kernel and op, of its kernel, of its backend; all that ran."""


@dataclass(frozen=True)
class Run:
    """What was asked of the suite: of which kernels, and which cases. By this its cases are run again up to one."""

    backend: str = ""
    kernel: str = ""
    ops: tuple[str, ...] = ()
    case: str = ""
    smoke: bool = False
    large: bool = False
    shard: str = ""
    fuzz: int = 0
    """How many random cases of each op, in place of the suite's own."""
    seed: int = 0
    known: str = ""
    """A file of known failures: of an entry that is stale, which is no case's failure."""

    @property
    def befores(self) -> tuple[Before, ...]:
        """What may be run again before a failure, the fewest cases first, and nothing that did not run."""
        kernel: tuple[Before, ...] = () if self.ops else ("kernel",)
        backend: tuple[Before, ...] = () if self.ops or self.kernel else ("backend",)
        return ("op", *kernel, *backend, "run")

    def words(self, before: Before, kernel: str, op: str) -> list[str]:
        """The options that ask for this, or for that of it which is of a failure's kernel and op, kernel or backend."""
        if before == "run":
            words = ["--backend", self.backend] if self.backend else []
            words += ["--kernel", self.kernel] if self.kernel else []
            words += [word for each in self.ops for word in ("--op", each)]
            words += ["--shard", self.shard] if self.shard else []
        else:
            words = ["--backend", kernel.partition(":")[0]] if before == "backend" else ["--kernel", kernel]
            words += ["--op", op] if before == "op" else []
        words += ["--case", self.case] if self.case else []
        words += ["--smoke"] * self.smoke + ["--large"] * self.large
        return words + (["--fuzz", f"{self.fuzz}", "--seed", f"{self.seed}"] if self.fuzz else [])


@dataclass(frozen=True)
class Outcome:
    """One case on one kernel: what was found, and what the bound is.

    `failures` names each check that failed, as `guards: ...`. A refused case has the kernel's reason instead; a known
    failure has the reason that `known_failures.toml` gives.
    """

    case: str
    op: str
    kernel: str
    weight_format: str
    status: Status
    reason: str = ""
    failures: tuple[str, ...] = ()
    error: float | None = None
    """NMSE against float64."""
    worst: float | None = None
    """The largest error of an element, relative to its row's root mean square."""
    bound: float | None = None
    """On the NMSE: the kernel's own, and the rounding of the output's format."""
    batch_invariant: bool | None = None
    """Whether a row of the batch equals the row alone, bit for bit; None where that means nothing."""
    cases: str = ""
    """The file that the case was read from; empty for the suite's own."""
    device: str = "cpu"
    peer: str = ""
    """The kernel that it need not be closer than, if one was named."""
    trace: str = ""
    """The traceback, where the kernel raised."""

    raised: str = ""
    """What it raised, and where: `ValueError, package/file.py:12`."""

    before: Before = ""
    """Whose cases must run before it in one process, where it fails only then."""

    run: Run = Run()
    as_drawn: Outcome | None = None
    """Of a random case that was made smaller: what came of it before."""
    alike: int = 0
    """How many more of the random cases failed like this one, which alone is told."""

    @property
    def passed(self) -> bool:
        return self.status == "pass"

    @property
    def kind(self) -> tuple[str, ...]:
        """By which failures are alike: the kernel, the op, the check that failed first, what it raised where."""
        return self.kernel, self.op, self.failures[0].partition(":")[0], self.raised

    @property
    def command(self) -> str:
        """What runs exactly this case again, after others where it fails only then."""
        return shlex.join(self.words)

    @property
    def words(self) -> list[str]:
        """The command's words."""
        if not self.op:
            return ["kernelmux", "check", "--backend", self.kernel.partition(":")[0], "--known", self.run.known]
        # A random case that is in no file is the last of those that are drawn up to it.
        before = self.before or ("op" if self.run.fuzz and not self.cases else "")
        words = ["kernelmux", "check"]
        words += self.run.words(before, self.kernel, self.op) if before else ["--kernel", self.kernel]
        words += ["--until" if before else "--case", self.case]
        words += ["--device", self.device] if self.device != "cpu" else []
        words += ["--peer", self.peer] if self.peer else []
        words += ["--cases", self.cases] if self.cases and not (before and self.run.fuzz) else []
        return words


def share(outcome: Outcome) -> float:
    """How much of its bound a measured error takes: over 1 it is too much."""
    if not outcome.bound:
        return math.inf if outcome.error else 0.0
    return (outcome.error or 0.0) / outcome.bound
