"""Work that can wait: done by a thread while nothing else is to be done, and at the end of the process at last."""

from __future__ import annotations

import atexit
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread

QUIET = 1.0
"""Seconds for which nobody has been at work before a job goes on: it would take their threads and memory."""


class StoppedError(Exception):
    """A job was told to end; raised by `Background.go_on`, and by nobody else."""


class Background:
    """Jobs that are done one after the other, the first that raises being the last.

    `failed` is called with what it raised, in the thread; nothing is added any more from then on.
    """

    def __init__(self, failed: Callable[[Exception], object]) -> None:
        self._failed = failed
        self._jobs: deque[Callable[[], object]] = deque()
        self._lock = Lock()
        self._thread: Thread | None = None
        self._ended = False
        self._hurried = Event()
        self._over = Event()
        """Not the thread's end: a `join` that Ctrl-C has ended takes the thread for ended, too."""
        self._at_work = 0
        self._worked = time.monotonic()

    def add(self, job: Callable[[], object]) -> None:
        """A job to do once `start` is called."""
        with self._lock:
            if not self._ended:
                self._jobs.append(job)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the block, and for a moment after it, jobs wait."""
        with self._lock:
            self._at_work += 1
        try:
            yield
        finally:
            with self._lock:
                self._at_work -= 1
                self._worked = time.monotonic()

    def start(self) -> None:
        """Begins with the jobs; the process waits for them at its end."""
        with self._lock:
            if self._jobs and self._thread is None:
                self._over.clear()
                self._thread = Thread(target=self._run, name="background", daemon=True)
                atexit.register(self.finish)
                self._thread.start()

    def finish(self) -> None:
        """Returns when all is done, which nothing delays any more; Ctrl-C ends that as `stop` does."""
        try:
            self.start()
            self._hurried.set()
            if (thread := self._thread) is not None:
                self._over.wait()
                # What it still frees, tensors among it, must be gone before the interpreter is.
                thread.join(QUIET)
        except KeyboardInterrupt:
            self.stop()
            raise
        finally:
            self._hurried.clear()

    def stop(self) -> None:
        """Ends the job that is being done at its next `go_on`, and drops the others."""
        self._ended = True
        self._hurried.set()
        if self._thread is not None:
            self._over.wait()

    def go_on(self) -> None:
        """For jobs to call often: returns when nobody else is at work; StoppedError where they are to end."""
        while not self._hurried.is_set() and (self._at_work or time.monotonic() - self._worked < QUIET):
            self._hurried.wait(QUIET / 4)
        if self._ended:
            raise StoppedError

    def _run(self) -> None:
        try:
            while (job := self._next()) is not None:
                self.go_on()
                job()
        except Exception as error:
            self._ended = True
            if not isinstance(error, StoppedError):
                self._failed(error)
            with self._lock:
                self._end()

    def _next(self) -> Callable[[], object] | None:
        with self._lock:
            if self._jobs:
                return self._jobs.popleft()
            self._end()
            return None

    def _end(self) -> None:
        self._jobs.clear()
        self._thread = None
        self._over.set()
        atexit.unregister(self.finish)
