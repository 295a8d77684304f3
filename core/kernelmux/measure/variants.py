"""A stage of its own: which of a kernel's variants is the fastest at a work, measured on the device that is here.

Enters: works, kernels with variants. Leaves: microseconds by variant, and this machine's table with the best ones in
it, where every later plan finds them. A plan measures nothing by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import Any

from kernelmux.contract.answers import checked_work
from kernelmux.contract.device import Device
from kernelmux.contract.kernel import Kernel
from kernelmux.contract.packed import PackedWeights
from kernelmux.contract.registry import Registry
from kernelmux.measure.ops import bind_once, find_kernels, random_weights, time_kernel
from kernelmux.measure.table import package_of, remember
from kernelmux.measure.works import Work

THREADS = 6
"""Variants that are compiled at once."""

Times = Mapping[str, float | None]
"""Microseconds by a variant's name; None for one that does not compile, or does not fit."""


def measure_works(
    works: Iterable[Work], registry: Registry, device: Device, progress: Callable[[str, Times], object] = print
) -> dict[str, str]:
    """The best variant for each work of every kernel that has several, kept in this machine's table for the backend.

    `progress` is told each work with its times as soon as these are known.
    """
    best: dict[str, str] = {}
    for work in works:
        weights = random_weights([work], device)
        for name, kernel in find_kernels(work, registry, device)[0].items():
            if len(kernel.variants(work.node)) < 2 or (label := checked_work(kernel, work.node)) in best:
                continue
            times = time_variants(work, name, kernel, weights)
            progress(label, times)
            known = {variant: time for variant, time in times.items() if time is not None}
            if known:
                best[label] = min(known, key=known.__getitem__)
                remember(package_of(kernel), device, {label: best[label]})
    return best


def time_variants(work: Work, name: str, kernel: Kernel, weights: PackedWeights) -> dict[str, float | None]:
    """Microseconds a launch of each variant, in the formats that the kernel likes best."""
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
    except (Exception, SystemExit):
        # Of all that a compiler and a launcher may raise nothing stops measuring: other variants are left.
        return None
