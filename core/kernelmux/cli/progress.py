"""How far a preparation has come, on stderr: a bar on a terminal, elsewhere a line where a stage takes long."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import typer

from kernelmux.graph.formats import human_bytes
from kernelmux.run.progress import Progress

QUIET = 1.0
"""Seconds that may pass without a word, where there is no terminal."""


@dataclass
class ProgressBar:
    """Shows how far each stage is; a context, at whose end the bar is gone."""

    _bar: Any = None
    _task: Any = None
    _stage: str = ""
    _began: float = field(default_factory=time.monotonic)
    _said: float = field(default_factory=time.monotonic)

    def __enter__(self) -> ProgressBar:
        if sys.stderr.isatty():
            from rich import progress as bars
            from rich.console import Console

            parts = "{task.description}", bars.BarColumn(), "{task.fields[told]}", bars.TimeRemainingColumn()
            self._bar = bars.Progress(*parts, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, progress: Progress) -> None:
        """A stage has come so far."""
        now = time.monotonic()
        if progress.stage != self._stage:
            self._stage, self._began = progress.stage, now
            if self._bar is not None:
                self._bar.update(self._task, visible=False) if self._task is not None else None
                self._task = self._bar.add_task(progress.stage, total=progress.total, told="")
        if self._bar is not None:
            self._bar.update(self._task, completed=progress.done, told=_told(progress))
        elif now - self._said >= QUIET:
            self._said = now
            left = (now - self._began) * (progress.total / progress.done - 1) if progress.done else 0.0
            typer.echo(f"{progress.stage}: {_told(progress)}, {left:.0f} s left", err=True)


def _told(progress: Progress) -> str:
    if progress.counts_bytes:
        return f"{human_bytes(progress.done)} of {human_bytes(progress.total)}"
    return f"{progress.done} of {progress.total}"
