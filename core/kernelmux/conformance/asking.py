"""Whether asking is pure: what a backend does to the machine while it is only asked what it would take.

Enters: a block of asking. Leaves: what was written, started or allocated in it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from kernelmux.contract.device import Device

WRITES = {
    "os.mkdir": "makes the folder {}",
    "os.rename": "renames {}",
    "os.remove": "removes {}",
    "os.truncate": "truncates {}",
    "subprocess.Popen": "starts the process {}",
    "os.posix_spawn": "starts the process {}",
    "os.system": "runs the command {}",
}
"""Python's audit events (its documentation's table of them) by which something outside the process changes."""
BYTECODE = "__pycache__"
"""Where Python itself keeps what it imports."""

_watching: list[list[str]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    said = ""
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, str | bytes) and (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            said = f"writes {os.fsdecode(path)}"
    elif event in WRITES:
        said = WRITES[event].format(arguments[0] if arguments else "")
    if said and BYTECODE not in said and "/dev/" not in said:
        _watching[-1].append(said)


@cache
def _install() -> None:
    """An audit hook stays for the life of the process: it is one, and looks only where somebody watches."""
    sys.addaudithook(_hook)


@contextmanager
def watched(device: Device) -> Iterator[list[str]]:
    """A list that holds, after the block, what was done in it: files written, processes started, memory allocated."""
    _install()
    found: list[str] = []
    before = device.platform.allocations(device)
    _watching.append(found)
    try:
        yield found
    finally:
        _watching.pop()
        if device.platform.allocations(device) != before:
            found.append(f"allocates memory on {device.torch}")
