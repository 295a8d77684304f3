"""How torch's threads wait for each other: asleep where other processes run, else spinning, as OpenMP has it.

Each of torch's ops ends when all of its threads have come. One that spins may keep the very thread that it waits for
from a processor, for a scheduling quantum an op; one that sleeps is woken, which takes longer where nobody else is.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

ASKED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""By which users say how threads wait."""
RUNNING = Path("/proc/loadavg")
SAMPLES, APART = 3, 0.005


def wait_by_load() -> None:
    """Has torch's threads sleep where another process runs and nobody has said otherwise; before torch is loaded."""
    if "torch" not in sys.modules and not any(name in os.environ for name in ASKED) and _others_run():
        os.environ["OMP_WAIT_POLICY"] = "passive"


def _others_run() -> bool:
    """Whether somebody else was at work, or waiting to be, each time that this looked; not where nobody can tell."""
    for _ in range(SAMPLES):
        try:
            running = int(RUNNING.read_text().split()[3].partition("/")[0])
        except (OSError, ValueError, IndexError):
            return False
        # One of them is this process.
        if running < 2:
            return False
        time.sleep(APART)
    return True
