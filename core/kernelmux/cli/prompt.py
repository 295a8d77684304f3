"""What a user says to a model: an option's text, all of stdin, or stdin line by line; and with what tools."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from kernelmux.cli.output import lent_stdout, say, tell
from kernelmux.errors import KernelmuxError, ModelError
from kernelmux.files import read_whole

if TYPE_CHECKING:
    from kernelmux.run.model import Model, PromptOptions

STDIN = "-"
"""In place of a prompt: stdin."""
COMMANDS = HELP_COMMAND, QUIT = "/help", "/quit"
"""What is typed in a chat, and is no message."""
HELP = f"each line is a message; Ctrl-C ends an answer, Ctrl-D or {QUIT} the chat; {HELP_COMMAND} says so again"


def asked_prompt(text: str) -> str:
    """The prompt of an option: `-` is what stdin holds, without the end of its last line."""
    if text == STDIN:
        return _decoded(_stdin().read()).removesuffix("\n").removesuffix("\r")
    # Bytes of an argument that the locale's encoding lacks are half surrogate pairs.
    with suppress(UnicodeError):
        return os.fsencode(text).decode()
    return text


def asked_ids(ids: str) -> list[int]:
    """The token ids of `--ids`, in place of a prompt."""
    parts = ids.replace(",", " ").split()
    if not parts or not all(part.isascii() and part.isdigit() for part in parts):
        raise KernelmuxError(f"--ids {ids[:80]}: token ids, with commas between them, as 1,15,7")
    return [int(part) for part in parts]


def asked_options(
    parse_special: bool, chat_template: Path | None, tools: Path | None, documents: Path | None
) -> PromptOptions:
    """How what is said becomes token ids, by the files that options name; ModelError for one that is not as needed."""
    from kernelmux.run.model import PromptOptions

    template = None if chat_template is None else _text(chat_template)
    return PromptOptions(parse_special, template, _objects(tools), _objects(documents))


def tell_unread(model: Model, options: PromptOptions) -> None:
    """On stderr, of what is given to a chat template that says nothing of it."""
    from kernelmux.models.chat import stated_template

    template = options.chat_template or stated_template(model.source.file.metadata, options.tools is not None) or ""
    for name, given in (("tools", options.tools), ("documents", options.documents)):
        if given is not None and not re.search(rf"\b{name}\b", template):
            say(f"kernelmux: the chat template does not read {name}: they are not used", err=True, fg="red", bold=True)


def _objects(path: Path | None) -> list[Any] | None:
    """A JSON list of objects."""
    if path is None:
        return None
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is no JSON: {error}", file=str(path)) from error
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ModelError(f"{path}: a JSON list of objects is needed", file=str(path))
    return found


def _text(path: Path) -> str:
    try:
        return read_whole(path).decode("utf-8-sig")
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}", file=str(path)) from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: not UTF-8 text ({error.reason})", file=str(path)) from error


def said_lines() -> Iterator[str]:
    """Lines of stdin that are not empty; where that is a terminal, after a prompt each, and but for its COMMANDS."""
    stream = _stdin()
    for line in _typed() if sys.stdin.isatty() else map(_decoded, stream):
        if line.strip():
            yield line.removesuffix("\n").removesuffix("\r")


def _typed() -> Iterator[str]:
    with suppress(ImportError):
        import readline  # noqa: F401  # `input` edits lines by it.
    say(HELP, err=True)
    while True:
        try:
            with lent_stdout():
                line = input("> ")
        except EOFError:
            tell()
            return
        # Others are messages: models have some of their own, as `/no_think`.
        if (command := line.strip()) not in COMMANDS:
            yield line
        elif command == QUIT:
            return
        else:
            say(HELP, err=True)


def _stdin() -> BinaryIO:
    if sys.stdin is None:
        raise ModelError("stdin is closed: there is no prompt to read")
    return sys.stdin.buffer


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelError(f"stdin: not UTF-8 text (byte {data[error.start]:#04x} at {error.start})") from error
