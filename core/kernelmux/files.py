"""Files that are written whole or not at all, beside the one that they replace, and renamed; or read whole, bounded.

Enters: a path and text or bytes. Leaves: the file, or an OSError and whatever was there before.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from kernelmux.errors import KernelmuxError

MAGIC = b"GGUF"
"""What a model file begins with."""
LARGEST_TEXT = 256 << 20
"""Bytes of a file that is read whole: policies, templates, texts, cases."""
PART = ".kernelmux-"
"""How the name of what is not whole yet begins."""
_parts: set[Path] = set()
"""What this process has begun to write, and is not whole yet."""


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that is at `path` once the block has ended, and nowhere where it raised.

    A link stays one: what it points to is replaced. What is no regular file, as a pipe, is written as it is. OSError
    where the folder takes no file; KernelmuxError where a model would be lost, and for a folder.
    """
    target = Path(path).resolve()
    if target.is_dir():
        raise KernelmuxError(f"{path} is a folder: name a file to write", file=str(path))
    if target.exists() and not target.is_file():
        with target.open("wb") as file:
            yield file
        return
    refuse_model(path)
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(13, "Permission denied", str(path))
    with renamed(target) as file:
        yield file
        if target.exists():
            os.chmod(file.name, target.stat().st_mode & 0o7777)


@contextmanager
def renamed(target: Path, prefix: str = PART, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A new file beside another, to be written in the block and then renamed to it; where the block raises it is gone.

    Another process may look at `target` at the same time. `mode` is as umask leaves it.
    """
    with _part(target, prefix) as part, _told_as(target, part):
        with open(part, "xb", opener=lambda path, flags: os.open(path, flags, mode)) as file:
            yield file
        part.replace(target)


@contextmanager
def _part(target: Path, prefix: str = PART) -> Iterator[Path]:
    """A name beside `target` that nothing has, for what is not whole yet; what has it after the block is removed."""
    part = target.with_name(f"{prefix}{secrets.token_hex(8)}")
    _parts.add(part)
    try:
        yield part
    finally:
        _remove(part)
        _parts.discard(part)


def remove_parts() -> None:
    """Removes all that is not whole yet, for a process that ends in the midst of its blocks, as by a signal."""
    for part in tuple(_parts):
        _remove(part)


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)


@contextmanager
def _told_as(path: Path, part: Path) -> Iterator[None]:
    """An OSError about `part` names what was asked for, and not what that is called until it is whole."""
    try:
        yield
    except OSError as error:
        if str(error.filename) != str(part):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, to be filled in the block and then renamed to it; where the block raises it is gone.

    KernelmuxError where there is something at `path` already, but an empty folder.
    """
    target = path.absolute()
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise KernelmuxError(f"{path} is there already: name a new folder to write", file=str(path))
    with _part(target) as part:
        with _told_as(path, part):
            part.mkdir()
        yield part
        with _told_as(path, part):
            part.replace(target)


def read_whole(path: str | Path) -> bytes:
    """All that a file or a pipe has; OSError where that is more than any such file needs, as of an endless device."""
    with open(path, "rb") as file:
        data = file.read(LARGEST_TEXT + 1)
    if len(data) > LARGEST_TEXT:
        raise OSError(errno.EFBIG, f"more than {LARGEST_TEXT >> 20} MB, which no such file has", str(path))
    return data


def write_whole(path: str | Path, data: str | bytes) -> None:
    """Writes a file as `replacing` does, text in UTF-8."""
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def refuse_model(path: str | Path) -> None:
    """KernelmuxError where a file to write is a model, which nothing here writes."""
    start = b""
    with suppress(OSError):
        # A pipe would wait for somebody to write to it.
        if Path(path).is_file():
            with open(path, "rb") as file:
                start = file.read(len(MAGIC))
    if start == MAGIC:
        raise KernelmuxError(f"{path} is a model, which would be lost: name another file to write", file=str(path))
