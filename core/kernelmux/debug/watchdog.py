"""A launch that does not come back: named, with the stack of the thread that waits for it, and the process ended.

Enters: an observer for a session's steps, and seconds. On a device every launch is waited for, and what would be one
replay is made launch by launch. Packing, compiling and binding are no launches, and take as long as they take. What
spins within C and never lets go of Python's lock stops every thread: then faulthandler's own ends the process, with
exit code 1, and the node stands in its traceback as the name of a function.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Event, Lock, Thread
from types import FunctionType

from kernelmux.contract.kernel import Launch
from kernelmux.plan.formats import Step
from kernelmux.run.walk import Walk
from kernelmux.run.watch import Observer

EXIT_CODE = 75
"""Of a process whose launch did not come back: EX_TEMPFAIL of sysexits.h, which no other error here has."""
LOOKS = 10
"""Times that a limit is looked after before it is over."""
STDERR = 2


@dataclass(frozen=True)
class _Pending:
    """A launch that has begun."""

    walk: Walk
    index: int
    since: float
    beside: str = ""
    """The kernel, where it is not the step's own."""


class Watchdog(Observer):
    """Ends the process where a launch takes longer than so many seconds; it watches within `watching`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._pending: _Pending | None = None
        self._walking, self._lock = False, Lock()
        self._over = Event()
        self._named: dict[tuple[Walk, int, str], Callable[[Launch, Walk], None]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A thread looks after the launches within the block."""
        thread = Thread(target=self._look, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
            self._walks(False)

    def wants(self, walk: Walk, rehearsal: bool) -> bool:
        return True

    def before(self, walk: Walk, index: int) -> None:
        if index == 0:
            self._walks(True)

    def launch(self, walk: Walk, index: int, call: Launch) -> None:
        self._wait(walk, index, "", call)

    def launch_beside(self, walk: Walk, index: int, kernel: str, call: Launch) -> None:
        self._wait(walk, index, kernel, call)

    def _wait(self, walk: Walk, index: int, beside: str, call: Launch) -> None:
        """Makes a launch and waits for it, while it is looked after."""
        key = walk, index, beside
        if key not in self._named:
            self._named[key] = _named(walk.steps[index], beside)
        self._pending = _Pending(walk, index, time.monotonic(), beside)
        try:
            self._named[key](call, walk)
        except BaseException:
            self._walks(False)
            raise
        finally:
            self._pending = None

    def end(self, walk: Walk) -> None:
        self._walks(False)

    def _walks(self, walking: bool) -> None:
        """Has faulthandler's thread wait while a walk is made, for so long that this one's has its turn first."""
        with self._lock:
            self._walking = walking
            if walking:
                faulthandler.dump_traceback_later(2 * self.seconds, file=STDERR, exit=True)
            else:
                faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        while not self._over.wait(self.seconds / LOOKS):
            pending = self._pending
            if pending is not None and time.monotonic() - pending.since > self.seconds:
                _end(pending, self.seconds)
            with self._lock:
                if self._walking:
                    # Not before another such time: this thread still gets its turn.
                    faulthandler.dump_traceback_later(2 * self.seconds, file=STDERR, exit=True)


def _run(call: Launch, walk: Walk) -> None:
    call()
    walk.device.platform.synchronize(walk.device)


def _named(step: Step, beside: str) -> Callable[[Launch, Walk], None]:
    """What makes a launch and waits for it, as a function whose name in a traceback is the node's."""
    code = _run.__code__.replace(co_name=f"{step.node.name} ({step.node.op}) by {beside or step.choice.name}")
    return FunctionType(code, globals())


def _kernel(pending: _Pending) -> str:
    own = pending.walk.steps[pending.index].choice.name
    return f"{pending.beside}, beside {own}," if pending.beside else own


def _end(pending: _Pending, seconds: float) -> None:
    """Says which launch it is, and where all threads are; then ends the process, whatever they do."""
    step, steps = pending.walk.steps[pending.index], pending.walk.steps
    node = step.node
    values = ", ".join(f"{v.name} {list(v.shape)} {v.format}" for v in (*node.inputs, *node.weights, *node.outputs))
    message = (
        f"kernelmux: {_kernel(pending)} at {node.name} ({node.op}, step {pending.index + 1} of {len(steps)}) on "
        f"{pending.walk.device.torch} has not come back within {seconds:g} s; {node.rows} rows; {values}\n"
    )
    with suppress(Exception):
        sys.stdout.flush()
    os.write(STDERR, message.encode(errors="backslashreplace"))
    faulthandler.dump_traceback(STDERR, all_threads=True)
    os._exit(EXIT_CODE)
