"""What a command prints: stdout is its own, and what backends or libraries print meanwhile goes to stderr.

Enters: lines, documents. Leaves: text on a terminal, in a pipe or in a file, in whatever encoding that has.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

import typer

_streams: list[TextIO] = []
"""The command's own stdout, while one runs."""


class _Closed(io.TextIOBase):
    """In place of a stdout that the caller has closed: writing is an error in one line."""

    def write(self, text: str) -> NoReturn:
        raise OSError("stdout is closed: there is nowhere to write to")


def open_streams() -> None:
    """Makes of the three standard streams what a command can rely on, once, at its start.

    What an encoding lacks is written as its escape, and no file that is opened gets the number of a closed stream, for
    what a library prints there would go into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or _Closed()
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def own_stdout() -> Iterator[None]:
    """Within the block `tell` alone writes to stdout: what others print, as backends do, goes to stderr."""
    stream = sys.stdout
    _streams.append(stream)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = stream
        _streams.pop()


@contextmanager
def lent_stdout() -> Iterator[None]:
    """Within the block stdout is the command's own again, for what can only print there, as `input`."""
    others, sys.stdout = sys.stdout, stdout()
    try:
        yield
    finally:
        sys.stdout = others


def stdout() -> TextIO:
    """The stream of `tell`."""
    return _streams[-1] if _streams else sys.stdout


def tell(text: str = "", nl: bool = True, **style: Any) -> None:
    """Text on stdout."""
    typer.secho(text, file=stdout(), nl=nl, **style)


def print_json(document: Any) -> None:
    """To stdout, as it is: no colours, no wrapping; in ASCII where the stream does not take all of Unicode."""
    whole = (getattr(stdout(), "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")
    tell(json.dumps(document, indent=1, ensure_ascii=not whole))


def line_width() -> int:
    """Columns of the terminal; the usual number where stdout is none."""
    from kernelmux.plan.table import WIDTH

    return shutil.get_terminal_size().columns if stdout().isatty() else WIDTH


def say(line: str, err: bool = False, indent: str = "  ", **style: Any) -> None:
    """A line for a person: on a terminal broken between words at the usual width, elsewhere in one piece."""
    from kernelmux.plan.table import WIDTH, wrapped

    width = min(shutil.get_terminal_size().columns, WIDTH)
    stream = sys.stderr if err else stdout()
    for part in wrapped(line, width, indent) if stream.isatty() else [line]:
        typer.secho(part, file=stream, **style)


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """A table that fits a terminal; tab-separated lines where stdout is not one."""
    from kernelmux.plan.table import table

    cells = [[str(cell) for cell in row] for row in rows]
    if stdout().isatty():
        lines = [*([title] if title else []), *table(headings, cells, line_width())]
    else:
        lines = ["\t".join(row) for row in (headings, *cells)]
    for line in lines:
        tell(line)
