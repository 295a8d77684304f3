"""What a user says to a model: an option's text, all of stdin, or stdin line by line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO

from kernelmux.cli.output import lent_stdout, tell
from kernelmux.errors import ModelError

STDIN = "-"
"""In place of a prompt: stdin."""


def asked_prompt(text: str) -> str:
    """The prompt of an option: `-` is what stdin holds, without the end of its last line."""
    if text == STDIN:
        return _decoded(_stdin().read()).removesuffix("\n").removesuffix("\r")
    # Bytes of an argument that the locale's encoding lacks are half surrogate pairs.
    with suppress(UnicodeError):
        return os.fsencode(text).decode()
    return text


def said_lines() -> Iterator[str]:
    """Lines of stdin that are not empty, after a prompt where that is a terminal."""
    stream = _stdin()
    for line in _typed() if sys.stdin.isatty() else map(_decoded, stream):
        if line.strip():
            yield line.removesuffix("\n").removesuffix("\r")


def _typed() -> Iterator[str]:
    with suppress(ImportError):
        import readline  # noqa: F401  # `input` edits lines by it.
    while True:
        try:
            with lent_stdout():
                line = input("> ")
        except EOFError:
            tell()
            return
        yield line


def _stdin() -> BinaryIO:
    if sys.stdin is None:
        raise ModelError("stdin is closed: there is no prompt to read")
    return sys.stdin.buffer


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelError(f"stdin: not UTF-8 text (byte {data[error.start]:#04x} at {error.start})") from error
