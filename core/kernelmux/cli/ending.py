"""Signals that end a command: they end it at once, as they do any process, but what is not whole yet is removed first.

The library has no handlers. A command has them while it runs, and they are a thread's work: the main one may be in a
kernel that does not come back, where Python calls no handler. Ctrl-C is Python's own, and told once.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from kernelmux.files import remove_parts

ENDING = (signal.SIGTERM, signal.SIGHUP)
"""What ends a process that has not said otherwise, and is no wish to go on, as Ctrl-C is in a chat."""
SAME = 0.02
"""Seconds after an interrupt within which another is the same one, sent again."""
_interrupts = 0


def interrupts() -> int:
    """How many there have been: one that a kernel caught and went on from is one, too."""
    return _interrupts


@contextmanager
def interrupted_once() -> Iterator[None]:
    """In the block an interrupt that is sent twice is one: the second would cut off what the first one lets be told.

    `timeout --signal=INT` sends it to the process and to its group, which is the process again. No hand presses
    Ctrl-C as fast. As `removing_parts`, this changes nothing where somebody else has said what the signal does.
    """
    usual = signal.default_int_handler
    if signal.getsignal(signal.SIGINT) is not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    last = -math.inf

    def interrupt(number: int, frame: FrameType | None) -> None:
        global _interrupts
        nonlocal last
        if (now := time.monotonic()) - last >= SAME:
            last = now
            _interrupts += 1
            usual(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        # Once there was one the process ends, and the same one may come again while it does.
        if last == -math.inf:
            signal.signal(signal.SIGINT, usual)


@contextmanager
def removing_parts() -> Iterator[None]:
    """In the block such a signal removes files that are not whole yet, and ends the process with 128 and its number.

    Not where somebody has said what it does instead, as nohup; nor outside of the main thread, which alone may say so.
    """
    taken = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
    if not taken or threading.current_thread() is not threading.main_thread():
        yield
        return
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    threading.Thread(target=_wait, args=(woken,), name="ending", daemon=True).start()
    before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in taken:
        signal.signal(number, _woken)
    try:
        yield
    finally:
        _back_to_default()
        signal.set_wakeup_fd(before)
        os.close(wake)


def _wait(woken: int) -> None:
    """Ends the process once a signal that does so is read; other signals are read too."""
    while numbers := os.read(woken, 64):
        for number in numbers:
            if number in ENDING and signal.getsignal(number) is _woken:
                remove_parts()
                os._exit(128 + number)
    os.close(woken)


def _woken(number: int, frame: FrameType | None) -> None:
    """Does nothing: where there is no handler, no signal is written to be read."""


def _back_to_default() -> None:
    for number in ENDING:
        if signal.getsignal(number) is _woken:
            signal.signal(number, signal.SIG_DFL)


def _in_child() -> None:
    """In a forked process a signal is its own: what it is woken by is the one that it was forked from."""
    if any(signal.getsignal(number) is _woken for number in ENDING):
        _back_to_default()
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_in_child)
