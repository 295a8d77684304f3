"""A stage of its own: how long every kernel takes for the nodes of a model, so that a plan can choose by it.

Enters: works, kernels. Leaves: times by the package that a kernel is from. What fails is told and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kernelmux.contract.device import Device
from kernelmux.contract.kernel import Kernel
from kernelmux.contract.registry import Registry
from kernelmux.measure.ops import find_kernels, random_weights, time_kernel
from kernelmux.measure.table import package_of
from kernelmux.measure.times import family, size, written
from kernelmux.measure.works import Work

Found = dict[str, dict[str, dict[str, dict[str, float]]]]
"""Microseconds by package, family, size and rows."""


def time_works(
    works: Iterable[Work],
    registry: Registry,
    device: Device,
    found: Found,
    wanted: Callable[[str, Kernel, Work], bool] = lambda name, kernel, work: True,
    progress: Callable[[str], object] = print,
) -> None:
    """Adds to `found` every kernel's time for each work; works that a table would not tell apart are timed once."""
    for alike in _by_weights(works):
        # Weights are drawn and packed once for all row counts.
        weights = random_weights(alike, device)
        for work in alike:
            for name, kernel in find_kernels(work, registry, device)[0].items():
                families = found.get(package_of(kernel), {})
                kind, extents, rows = family(kernel, work.node), written(size(kernel, work.node)), str(work.m)
                if rows in families.get(kind, {}).get(extents, {}) or not wanted(name, kernel, work):
                    continue
                try:
                    timed = time_kernel(work, name, kernel, weights, device.platform.activations)
                except Exception as error:
                    progress(f"{name} at {work.label}, m = {rows}: {type(error).__name__}: {error}")
                    continue
                sizes = found.setdefault(package_of(kernel), {}).setdefault(kind, {})
                sizes.setdefault(extents, {})[rows] = round(timed.timing.median, 2)


def _by_weights(works: Iterable[Work]) -> Iterable[list[Work]]:
    """The works of each node, all row counts together."""
    groups: dict[tuple[object, ...], list[Work]] = {}
    for work in works:
        groups.setdefault((work.node.op, work.node.name, work.node.weights), []).append(work)
    return groups.values()
