"""Tasks done in another process, so that a kernel that crashes or hangs ends that one and not this.

Enters: tasks. Leaves: answers; for one whose process died, or made no progress for too long, an answer that says so.
The next task gets a new process.
"""

from __future__ import annotations

import multiprocessing
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from kernelmux.tune.worker import Answer, Task, serve

PATIENCE = {"launching": 30.0, "case": 30.0, "stepping": 120.0}
"""Seconds that a stage of this name may take. Kernels run in them, which are compiled before."""
MOST_PATIENCE = 300.0
"""Seconds for every other stage: starting, packing, compiling."""
GRACE = 5.0
"""Seconds that a process has for ending by itself."""


@dataclass
class Worker:
    """One process at a time on one device; use it in a `with` block."""

    device: str
    patience: float = 1.0
    """How many times as long as usual a stage may take."""
    _process: SpawnProcess | None = field(default=None)
    _connection: Connection | None = field(default=None)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def ask(self, task: Task) -> Answer:
        """The answer to a task, whatever becomes of the process."""
        connection = self._started()
        stage = "starting"
        try:
            connection.send(task)
            while True:
                limit = self.patience * PATIENCE.get(stage.partition(" ")[0], MOST_PATIENCE)
                if not connection.poll(limit):
                    self._stop(kill=True)
                    fault = f"it hung, or is far too slow: {stage} had not ended after {limit:.0f} s"
                    return Answer(fault=fault, over=True, hung=True)
                said = connection.recv()
                if isinstance(said, Answer):
                    break
                stage = str(said)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return Answer(fault=f"{self._died()} ({stage})", over=True)
        if said.over:
            self._stop()
        return said

    def _started(self) -> Connection:
        if self._connection is None or self._process is None or not self._process.is_alive():
            self._stop()
            context: Any = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe()
            self._process = context.Process(target=serve, args=(theirs, self.device), daemon=True)
            self._process.start()
            theirs.close()
            self._connection = ours
        return self._connection

    def _died(self) -> str:
        """How the process ended."""
        assert self._process is not None
        self._process.join(GRACE)
        code = self._process.exitcode
        self._stop(kill=True)
        if code is None:
            return "its process answers no more"
        if code < 0:
            with suppress(ValueError):
                return f"its process crashed: {signal.Signals(-code).name}"
        return f"its process ended with {code}"

    def _stop(self, kill: bool = False) -> None:
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            with suppress(OSError):
                if not kill:
                    connection.send(None)
            connection.close()
        if process is not None:
            process.join(0 if kill else GRACE)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
