"""Which tiling a kernel runs with: shipped for a card, else from this machine's cache, else measured once, else a rule.

Enters: a card, what is multiplied (a Shape) and the tilings that would do. Leaves: one of them, the same for as long as
the process lives. Measured is only while a plan is made, on the very card, and never under the interpreter.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from kernelmux.contract.device import Device

VERSION = 1
"""Changes whenever what was measured before says nothing of the kernels as they are."""
LEAST = 2**23
"""Weights from which measuring pays: a smaller matrix is read in few microseconds however it is tiled."""

T = TypeVar("T")
Measure = Callable[[Sequence[T]], Sequence[float | None]]
"""Microseconds of each tiling, None for one that fails."""


@dataclass(frozen=True)
class Shape:
    """A class of work: the kernel, rows (a power of two that covers them), outputs and inputs."""

    kernel: str
    m: int
    n: int
    k: int

    @staticmethod
    def of(kernel: str, m: int, n: int, k: int) -> Shape:
        """The class of m rows."""
        return Shape(kernel, 1 << (m - 1).bit_length(), n, k)

    def __str__(self) -> str:
        return f"{self.kernel} m{self.m} {self.n}x{self.k}"


_decided: dict[tuple[str, Shape], str] = {}


def choose(device: Device, shape: Shape, tilings: Sequence[T], default: T, measure: Measure[T] | None = None) -> T:
    """The tiling for a shape on a card: what was once chosen in this process stays.

    `measure` is asked where neither the shipped table nor the cache names one of `tilings`, and a card is there to ask.
    """
    named = {str(tiling): tiling for tiling in tilings}
    found = _decided.get((device.name, shape))
    if found not in named:
        found = shipped(device.name).get(str(shape))
    if found not in named:
        found = _read(cache_path(device.name)).get(str(shape))
    if found not in named:
        found = str(default)
        if measure is not None and shape.n * shape.k >= LEAST and can_measure(device):
            times = {str(t): time for t, time in zip(tilings, measure(tilings), strict=True) if time is not None}
            if times:
                found = min(times, key=lambda name: times[name])
                remember(device.name, {str(shape): found})
    _decided[device.name, shape] = found
    return named.get(found, default)


def can_measure(device: Device) -> bool:
    """Whether that very card is there: a plan may be made for one that is not."""
    if device.kind != "cuda" or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return False
    import torch

    if not torch.cuda.is_available() or device.index >= torch.cuda.device_count():
        return False
    return torch.cuda.get_device_name(device.index) == device.name and not torch.cuda.is_current_stream_capturing()


@cache
def shipped(card: str) -> Mapping[str, str]:
    """The table that comes with this package for a card; empty for one that has none."""
    for file in sorted(files("kernelmux_triton").joinpath("tunings").iterdir(), key=lambda file: file.name):
        table = _table(file.read_text("utf-8"))
        if card in table.get("cards", ()):
            return _choices(table)
    return {}


def cache_path(card: str) -> Path:
    """Where measured choices for a card are kept."""
    import triton

    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = re.sub(r"[^a-z0-9.]+", "-", f"{card} triton {triton.__version__}".lower())
    return Path(home) / "kernelmux" / "triton" / f"{name}.json"


def remember(card: str, choices: Mapping[str, str]) -> None:
    """Adds choices to the cache: the file is replaced as a whole, or, where that fails, left as it was."""
    path = cache_path(card)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = as_text([card], {**_read(path), **choices})
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(text)
        try:
            Path(file.name).replace(path)
        finally:
            Path(file.name).unlink(missing_ok=True)
    except OSError:
        # Without a place for a cache the next process measures again.
        return


def as_text(cards: Sequence[str], choices: Mapping[str, str]) -> str:
    """A table as it is stored."""
    table = {"version": VERSION, "cards": list(cards), "choices": dict(sorted(choices.items()))}
    return json.dumps(table, indent=1) + "\n"


def _read(path: Path) -> Mapping[str, str]:
    """The cache's choices; none where there is no file, or a damaged one."""
    try:
        return _choices(_table(path.read_text("utf-8")))
    except (OSError, UnicodeDecodeError):
        return {}


def _table(text: str) -> Mapping[str, Any]:
    try:
        table = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return table if isinstance(table, dict) and table.get("version") == VERSION else {}


def _choices(table: Mapping[str, Any]) -> Mapping[str, str]:
    choices = table.get("choices")
    if not isinstance(choices, dict):
        return {}
    return {shape: tiling for shape, tiling in choices.items() if isinstance(tiling, str)}
