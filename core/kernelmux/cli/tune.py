"""`kernelmux tune`: measures what a model's plan depends on, and writes the policy that came out best."""

from __future__ import annotations

import re
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kernelmux.cli.common import (
    DeviceName,
    Json,
    OptionalModelPath,
    RandomModel,
    Verbose,
    open_asked,
    refuse_overwriting,
    row_counts,
    traced,
)
from kernelmux.cli.output import line_width, print_json, say, tell

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from kernelmux.tune.tuning import Asked, Tuned

BUSY = 0.1
"""Share of unsteady times from which a person is told that the machine was busy."""
EVERY = 5.0
"""Seconds between lines where there is no terminal."""


@traced
def tune(
    model: OptionalModelPath = None,
    random: RandomModel = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the policy there; without it only measure."),
    ] = None,
    device: DeviceName = "cpu",
    m: Annotated[
        str, typer.Option("--m", metavar="M,M", help="Row counts; from 128 a prompt, else decoding.")
    ] = "1,2,4,8,16,32,64,512",
    context: Annotated[int, typer.Option("--context", min=1, help="Cached tokens of decoding sequences.")] = 512,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences decoded at once, a row count more.")] = 1,
    max_error: Annotated[
        float | None,
        typer.Option("--max-error", metavar="X", help="Error budget (NMSE) of every kernel; else the default's."),
    ] = None,
    budget: Annotated[
        str, typer.Option("--budget", metavar="TIME", help="How long it may take, as 90s or 5m; most of it measuring.")
    ] = "120s",
    variants: Annotated[
        bool, typer.Option("--variants", help="Also try every tiling of kernels that have some.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what this machine's table has.")] = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Time the kernels that a model may run, then whole plans; `auto` chooses by it from then on.

    Kernels run in a process of their own: one that crashes, hangs or fails its smoke cases is told and left out. What
    was measured is kept as it comes, so that an interrupted run goes on where it ended.
    """
    from kernelmux.contract import registry
    from kernelmux.contract.device import find_device
    from kernelmux.contract.record import Record
    from kernelmux.tune.plans import Named
    from kernelmux.tune.result import describe
    from kernelmux.tune.tuning import Asked, Tuning
    from kernelmux.tune.workers import Worker

    refuse_overwriting("--output", output, model=model)
    if max_error is not None and not max_error > 0:
        raise typer.BadParameter(f"an error budget is above 0, not {max_error:g}", param_hint="--max-error")
    counts = tuple(sorted({*row_counts(m), batch}))
    longest = max(counts[-1], context)
    opened, target = open_asked(model, random, device, longest), find_device(device)
    named = Named(str(model) if model is not None else str(random), random is not None, longest)
    asked = Asked(named, target, counts, context, _seconds(budget), max_error, variants)
    # A kernel that hangs had better not take the whole budget.
    patience = min(1.0, max(0.5, asked.seconds / 240))
    try:
        with _Shown(asked.seconds) as progress, Worker(device, patience) as worker:
            tuning = Tuning(asked, opened, Record(registry.current(), target), progress)
            if fresh:
                tuning.forget()
            tuned = tuning.run(worker)
    except KeyboardInterrupt:
        say("interrupted: what was measured is kept, and the same command goes on with the rest", err=True)
        raise typer.Exit(130) from None
    if json:
        print_json(describe(asked, tuned))
    else:
        _tell(asked, tuned)
    if not tuned.compared[0].times:
        # What was not run is not to be trusted, and a file would be.
        say(f"no policy is written: the tuned plan was not timed ({tuned.compared[0].note})", fg="red", err=True)
        raise typer.Exit(1)
    if output is not None:
        _write(asked, tuned, output)


def _seconds(text: str) -> float:
    """`120s`, `2m`, or a plain number of seconds."""
    read = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h|)", text.strip())
    if read is None or not float(read[1]):
        raise typer.BadParameter(f"{text!r} is no time: write 90s, 5m or 1h", param_hint="--budget")
    return float(read[1]) * {"s": 1, "": 1, "m": 60, "h": 3600}[read[2]]


class _Shown:
    """A progress bar on stderr with the time left; a line every few seconds where that is no terminal."""

    def __init__(self, seconds: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._terminal = sys.stderr.isatty()
        self._bar: Progress = Progress(
            *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True, disable=not self._terminal
        )
        self._task: TaskID = self._bar.add_task("", total=None)
        self._what, self._total, self._started, self._said = "", 0, 0.0, 0.0
        self._until = time.monotonic() + seconds

    def __enter__(self) -> _Shown:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, total: int, what: str) -> None:
        """A stage of so many things."""
        self._what, self._total, self._started, self._said = what, total, time.monotonic(), 0.0
        self._bar.reset(self._task, total=total, description=what)

    def advance(self, done: int, now: str) -> None:
        """So many are done; `now` is what comes next."""
        self._bar.update(self._task, completed=done, description=f"{self._what}: {now}" if now else self._what)
        if not self._terminal and now and time.monotonic() > self._said + EVERY:
            self._said = time.monotonic()
            budget = max(0.0, self._until - self._said)
            left = (self._said - self._started) / done * (self._total - done) if done else 0.0
            rest = f", some {left:.0f} s left" if done else ""
            rest = f"; {budget:.0f} s of the budget left, which does not do for all" if left > budget else rest
            typer.echo(f"{self._what}: {done} of {self._total}{rest}; now {now}", err=True)

    def tell(self, line: str) -> None:
        """A line above the bar."""
        if self._terminal:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            typer.echo(line, err=True)


def _tell(asked: Asked, tuned: Tuned) -> None:
    from kernelmux.tune.result import RATE, compared_lines, frontier_lines

    measured, width = tuned.measured, line_width()
    said = f"{measured.answered} kernels were timed"
    if measured.left:
        said += f", {measured.left} are left: the same command goes on with them, or ask for more than --budget"
    say(f"{said}; {len(measured.faults)} left out" if measured.faults else said)
    if measured.unsteady > BUSY * measured.answered:
        many = f"{measured.unsteady} of {measured.answered} times varied by more than twice"
        say(f"{many}, and are not kept: something else was running; the same command asks again", fg="red", err=True)
    lines = ["", f"{RATE} (* whose choices the policy took):", *compared_lines(tuned, asked.counts, width), ""]
    lines += ["KL divergence from float32, nats a token, beside speed:", *frontier_lines(tuned, width)]
    for line in lines:
        tell(line)
    for way in tuned.compared:
        if way.note:
            say(f"{way.label}: {way.note}")
    for note in tuned.notes:
        say(note, fg="red", err=True)


def _write(asked: Asked, tuned: Tuned, output: Path) -> None:
    from kernelmux.contract import registry
    from kernelmux.contract.cache import library_versions
    from kernelmux.files import write_whole
    from kernelmux.tune.result import policy_text

    libraries = (library for backend in registry.current().backends.values() for library in backend.libraries)
    versions = library_versions(dict.fromkeys(("kernelmux", *libraries)))
    command = shlex.join(["kernelmux", *sys.argv[1:]])
    write_whole(output, policy_text(asked, tuned, command, versions))
    say(f"{output}: written; run it with --policy {output}", err=True)
