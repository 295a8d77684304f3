"""How long each of a kernel's variants takes at a work, measured on the device that is here.

Enters: a work, a kernel with variants. Leaves: microseconds by variant. A plan measures nothing by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import Any

from kernelmux.contract.kernel import Kernel
from kernelmux.contract.packed import PackedWeights
from kernelmux.errors import contained
from kernelmux.measure.ops import bind_once, time_kernel
from kernelmux.measure.works import Work

THREADS = 6
"""Variants that are compiled at once."""


def time_variants(work: Work, name: str, kernel: Kernel, weights: PackedWeights) -> dict[str, float | None]:
    """Microseconds a launch of each variant by its name, in the formats that the kernel likes best.

    None for one that does not compile, or does not fit.
    """
    made = []
    for variant in kernel.variants(work.node):
        made.append(copy(kernel))
        made[-1].variant = variant
    # Binding compiles, several at a time; what fails then fails again when it is timed.
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda one: _attempt(lambda: bind_once(work, name, one, weights)), made))
    times: dict[str, float | None] = {}
    for one in made:
        timed = _attempt(lambda one=one: time_kernel(work, name, one, weights, ""))  # type: ignore[misc]
        times[str(one.variant)] = timed.timing.median if timed is not None else None
    return times


def _attempt(work: Callable[[], Any]) -> Any:
    """What a measurement gives; None where this variant does not compile, does not fit or does not start."""
    try:
        return work()
    except BaseException as error:
        # Of all that a compiler and a launcher may raise nothing stops measuring: other variants are left.
        contained(error)
        return None
