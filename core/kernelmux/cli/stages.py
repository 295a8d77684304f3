"""Where the time goes from the command to the first token: stages, each with its seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

FIRST = "first token"
"""All stages together."""
IMPORTED = time.monotonic()


@dataclass
class Stages:
    """Stages one after another, from the start of the process on: each with the seconds that it took."""

    _last: float = field(default_factory=lambda: _started())
    _seconds: dict[str, float] = field(default_factory=dict)

    def done(self, stage: str) -> None:
        """A stage ends now, or a part of it: it has taken the time since the one before."""
        now = time.monotonic()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._last
        self._last = now

    def told(self, prompt_seconds: float) -> Mapping[str, float]:
        """Seconds by stage, the prompt's last; and of all together as FIRST."""
        stages = {**self._seconds, "prompt": prompt_seconds}
        return {**stages, FIRST: sum(stages.values())}


def _started() -> float:
    """When this process began, by the monotonic clock; where its system does not say, when this module was imported."""
    with suppress(OSError, ValueError, IndexError, AttributeError):
        # proc(5): the start is the 22nd field, in ticks after boot; the name before it may hold spaces.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.monotonic() - age
    return IMPORTED
