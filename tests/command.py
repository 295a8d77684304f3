"""Runs the `kernelmux` command for tests: in a process of its own, or in this one where many would be slow."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from unittest import mock

TIMEOUT = 1800
"""Seconds after which a process is taken to hang, on the slowest of machines."""

# What makes typer and rich colour their output although nobody is watching, or narrows the backends down.
_UNSET = ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "NO_COLOR", "COLUMNS", "KERNELMUX_BACKENDS", "PYTHONWARNINGS")


# What is said of stages that take long, on a busy machine.
_PROGRESS = re.compile(r"^[a-z ]+( \.\.\.|: \S+( [kMG]?B)? of \S+( [kMG]?B)?)\n", re.MULTILINE)


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


def run_command(*arguments: object, env: Mapping[str, str] | None = None) -> Result:
    """The command in a process of its own, its output no terminal."""
    process = start_command(*arguments, env=env)
    out, err = process.communicate(timeout=TIMEOUT)
    return Result(process.returncode, out.decode(), _PROGRESS.sub("", err.decode()))


def start_command(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """The command, started; Ctrl-C (SIGINT) reaches it even where this process was told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [*_command(), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=clean_environment(env),
        )
    finally:
        signal.signal(signal.SIGINT, before)


def call_command(*arguments: object) -> Result:
    """The command within this process, which has loaded torch already. What is no KernelmuxError is raised."""
    from kernelmux.cli import main

    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with (
        mock.patch.object(sys, "argv", ["kernelmux", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    assert isinstance(code, int), f"exited with {code!r}, which is no exit code"
    return Result(code, out.getvalue(), _PROGRESS.sub("", err.getvalue()))


def assert_one_line_error(result: Result, *hints: str) -> None:
    """Exit code 2, nothing on stdout, and on stderr one line that holds every hint."""
    assert result.code == 2, result
    assert result.out == ""
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("kernelmux: ")
    for hint in hints:
        assert hint in lines[0], f"{hint!r} is not in {lines[0]!r}"


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a user at a capable terminal, without what this process was told about colours."""
    kept = {name: value for name, value in os.environ.items() if name not in _UNSET}
    return {**kept, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **(extra or {})}


def _command() -> list[str]:
    if importlib.util.find_spec("kernelmux.__main__") is not None:
        return [sys.executable, "-m", "kernelmux"]
    return [str(Path(sys.executable).with_name("kernelmux"))]


def read_table(lines: Iterable[str]) -> list[list[str]]:
    """The rows of a table as it is printed, the heading first: columns are two spaces or more apart."""
    return [re.split(r"  +", line) for line in lines]


def expanded(name: str) -> list[str]:
    """The nodes that a row of a table is about: `blk.0..2,5.attn_q` is four."""
    apart = re.split(r"(?<=[.+])([\d.,]*\d)(?=\.[a-z])", name)
    layers = [[str(layer) for part in listed.split(",") for layer in span(part)] for listed in apart[1::2]]
    texts = zip(*([text] * max(map(len, layers), default=1) for text in apart[::2]), strict=True)
    numbers = zip(*layers, strict=True) if layers else [()]
    return [
        "".join(part for pair in zip_longest(text, number, fillvalue="") for part in pair)
        for text, number in zip(texts, numbers, strict=True)
    ]


def span(text: str) -> range:
    """`3..8`, or a number alone, as a range."""
    low, _, high = text.partition("..")
    return range(int(low), int(high or low) + 1)
