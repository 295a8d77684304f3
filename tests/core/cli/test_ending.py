"""Signals that end a command: nothing half written is left, whatever the process waits for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from command import TIMEOUT, clean_environment, start_command
from kernelmux.cli.ending import removing_parts
from tiny_model import write_tiny_llama


def start(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    """A Python of its own, once it has said a line."""
    words = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, env=clean_environment())
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


WRITING = """
    import ctypes, signal, sys
    from pathlib import Path
    from kernelmux.cli.ending import removing_parts
    from kernelmux.files import new_folder, replacing

    at = Path(sys.argv[1])
    # As under nohup it would stay ignored.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with removing_parts(), new_folder(at / "folder") as folder, replacing(at / "file") as file:
        (folder / "a").write_text("half")
        file.write(b"half")
        print("ready", flush=True)
        # Of a mutex that this thread has it comes back never, and lets no handler of Python's be called.
        mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
        lock(mutex), lock(mutex)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_nothing_half_written_is_left_though_a_call_does_not_come_back(tmp_path: Path, number: signal.Signals):
    process = start(WRITING, tmp_path)
    assert len([*tmp_path.iterdir()]) == 2
    process.send_signal(number)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + number
    assert [*tmp_path.iterdir()] == []


def test_a_command_that_is_told_to_end_leaves_what_was_there(tmp_path: Path):
    model = write_tiny_llama(tmp_path / "m.gguf", context=100_000)
    (tmp_path / "cases.json").write_text("of before")
    before = {*tmp_path.iterdir()}
    asked = ("-p", "hello", "--max-tokens", 90_000, "--capture-cases", tmp_path / "cases.json")
    process = start_command("run", model, *asked)
    assert process.stdout is not None
    process.stdout.read(8)
    assert {*tmp_path.iterdir()} > before
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 143
    assert {*tmp_path.iterdir()} == before
    assert (tmp_path / "cases.json").read_text() == "of before"


FORKED = """
    import os, signal, sys
    from kernelmux.cli.ending import removing_parts

    begun, begins = os.pipe()
    with removing_parts():
        if not (child := os.fork()):
            os.write(begins, b"x")
            signal.pause()
        os.read(begun, 1)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    print("ready")
"""


def test_a_forked_process_ends_alone():
    process = start(FORKED)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with removing_parts():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


INTERRUPTED = """
    import signal, sys
    from kernelmux.cli import ending

    ending.SAME = float(sys.argv[1])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with ending.interrupted_once():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            print("ready", flush=True)
            signal.raise_signal(signal.SIGINT)
            assert ending.interrupts() == 1
    signal.raise_signal(signal.SIGINT)
"""
UNTOUCHED = """
    import signal
    from kernelmux.cli import ending

    signal.signal(signal.SIGINT, signal.default_int_handler)
    with ending.interrupted_once():
        print("ready", flush=True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""


def test_without_an_interrupt_the_signal_is_what_it_was():
    process = start(UNTOUCHED)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0


@pytest.mark.parametrize(("apart", "code"), [(3600, 0), (0, -signal.SIGINT)])
def test_an_interrupt_that_is_sent_twice_at_once_is_one(apart: float, code: int):
    process = start(INTERRUPTED, apart)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == code
