"""Failures of a run of `kernelmux check`, the first of each kernel run again in fresh processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from kernelmux.cli.progress import counting

if TYPE_CHECKING:
    from kernelmux.conformance import Outcome

START, SLOWER = 60.0, 3.0
"""A process that runs a failure again may take so many seconds to start, and then so many times what the run took."""


def run_alone(outcomes: Sequence[Outcome], took: float) -> tuple[list[Outcome], str]:
    """The outcomes, with what it takes to repeat those that go away alone; and what to say where Ctrl-C ended that.

    The run that they are of took so many seconds.
    """
    from kernelmux.conformance.alone import told_alone
    from kernelmux.conformance.report import count
    from kernelmux.conformance.run import under_way

    if not (many := count(outcomes)["fail"]):
        return list(outcomes), ""
    typer.echo(f"{many} failed: the first of each kernel run again, each in a fresh process", err=True)
    with counting(under_way, sum(outcome.status == "fail" for outcome in outcomes)) as count_one:
        found, interrupted = told_alone(outcomes, count_one, START + SLOWER * took)
    return found, "interrupted while failures ran again: those that are left may come of other cases" * interrupted
