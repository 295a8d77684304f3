"""What a command is doing, on stderr: a bar on a terminal, elsewhere a line for each stage that takes long."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Event, Thread
from types import TracebackType
from typing import Any

import typer

from kernelmux.cli.stages import Stages
from kernelmux.graph.formats import human_bytes
from kernelmux.run.progress import Progress

QUIET = 1.0
"""Seconds that may pass without a word, where there is no terminal."""
LONG = 60.0
"""Seconds that one of many things takes where something may be wrong with it."""


class ProgressBar:
    """Shows the stage that a command is in, and how far it is; a context, at whose end the bar is gone.

    What a stage has taken is told to `stages` when it is done.
    """

    def __init__(self, stages: Stages | None = None) -> None:
        self._stages = stages
        self._stage, self._number = "", 0
        self._latest: Progress | None = None
        self._over = Event()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> ProgressBar:
        if sys.stderr.isatty():
            from rich import progress as bars
            from rich.console import Console

            parts = "{task.description}", bars.BarColumn(), "{task.fields[told]}", bars.TimeRemainingColumn()
            self._bar = bars.Progress(*parts, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=None, told="")
            self._bar.start()
        else:
            Thread(target=self._tell, name="progress", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Nothing more is shown."""
        self._over.set()
        if self._bar is not None:
            self._bar.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage of which nobody can say how far it is."""
        self.begin(name)
        yield
        self._done()

    def begin(self, stage: str) -> None:
        """The same, until the next one begins."""
        self._latest, self._stage, self._number = None, stage, self._number + 1
        if self._bar is not None:
            self._bar.reset(self._task, description=stage, total=None, told="")

    def _done(self) -> None:
        if self._stages is not None:
            self._stages.done(self._stage)

    def show(self, progress: Progress) -> None:
        """A stage has come so far."""
        if progress.stage != self._stage:
            self.begin(progress.stage)
        self._latest = progress
        self._done()
        if self._bar is not None:
            self._bar.update(self._task, completed=progress.done, total=progress.total, told=_told(progress))

    def _tell(self) -> None:
        told = 0
        while not self._over.wait(QUIET):
            number, stage, latest = self._number, self._stage, self._latest
            # Once a stage: in a file or a log nobody watches it come further.
            if stage and number != told:
                told = number
                typer.echo(f"{stage}: {_told(latest)}" if latest else f"{stage} ...", err=True)


@contextmanager
def counting(now: Callable[[], tuple[str, float]], total: int | None = None) -> Iterator[Callable[[str], None]]:
    """Counts what is done, each under its name, on a bar, where stderr is a terminal.

    `now` says what is under way, and since when (time.monotonic): what takes LONG is named, on a terminal or not, and
    again each time that it has taken twice as long.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task("", total=total)

        def count(name: str) -> None:
            bars.update(task, description=name, advance=1)

        over = Event()
        say = partial(bars.console.print, markup=False, highlight=False, soft_wrap=True)
        Thread(target=_name_what_takes_long, args=(now, over, say), name="progress", daemon=True).start()
        try:
            yield count
        finally:
            over.set()


def _name_what_takes_long(now: Callable[[], tuple[str, float]], over: Event, say: Callable[[str], None]) -> None:
    last, after = ("", 0.0), LONG
    while not over.wait(min(QUIET, LONG)):
        if (latest := now()) != last:
            last, after = latest, LONG
        name, since = latest
        if name and time.monotonic() - since > after:
            say(f"{name} has been running for {after:g} s")
            after *= 2


def _told(progress: Progress) -> str:
    if progress.counts_bytes:
        return f"{human_bytes(progress.done)} of {human_bytes(progress.total)}"
    return f"{progress.done} of {progress.total}"
