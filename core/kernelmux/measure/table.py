"""Tables of what was measured: the best variant of a kernel for each work, shipped with a backend or made here.

Enters: kernels with their nodes. Leaves: a variant, and where it is known from. A table is JSON: `{"cards": ["NVIDIA
H200"], "arch": "sm_90", "choices": {work: variant}}`; shipped ones lie in the package's folder `tunings`. Looking one
up measures nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from kernelmux.contract import registry
from kernelmux.contract.answers import checked_variants, checked_work
from kernelmux.contract.cache import Cache, library_versions, read_table, source_hash, update_table
from kernelmux.contract.device import Device
from kernelmux.contract.kernel import Kernel
from kernelmux.graph.graph import TensorNode
from kernelmux.measure.times import Known, Times, family, look_up, size, written

KIND = "measurements"
"""The folder of core's cache."""
HERE = "measured here"
"""Where a time is known from that is this machine's own."""
DEFAULT = "default"
"""Where a variant is known from that is the kernel's own first."""


@dataclass(frozen=True)
class Table:
    """Variants by work, times, and what a plan says of where they are from."""

    source: str
    choices: Mapping[str, str]
    times: Times


@dataclass
class Tables:
    """All tables for one device, each read when it is first asked for."""

    device: Device
    _of_package: dict[str, tuple[Table, ...]] = field(default_factory=dict)

    def pick(self, kernel: Kernel, node: TensorNode) -> tuple[Any, str] | None:
        """The variant that a kernel had better run a node with, its extents known, and why; None where it has none."""
        named = checked_variants(kernel, node)
        if not named:
            return None
        work = checked_work(kernel, node)
        for table in self._of(kernel):
            if (variant := table.choices.get(work, "")) in named:
                return named[variant], table.source
        return next(iter(named.values())), DEFAULT

    def time(self, kernel: Kernel, node: TensorNode, rows: int, context: int) -> tuple[Known, str] | None:
        """How long a kernel took for such a node, its extents known, and where that is from; None: not measured.

        The table that knows best: measured at this very size, then at about so many rows, then this machine's own.
        """
        tables = self._of(kernel)
        found = [(look_up(table.times, kernel, node, rows, context), table.source) for table in tables]
        known = [(time, source) for time, source in found if time is not None]
        if not known:
            return None
        time, source = min(known, key=lambda entry: entry[0].doubt)
        return time, f"{source} at {time.other_size}" if time.other_size else source

    def is_measured_here(self, kernel: Kernel, node: TensorNode, rows: int, context: int) -> bool:
        """Whether this machine's table has the time of a kernel at this very node and row count."""
        sizes = self._of(kernel)[0].times.get(family(kernel, node), {})
        return str(rows) in sizes.get(written(size(kernel, node, context)), {})

    def _of(self, kernel: Kernel) -> tuple[Table, ...]:
        package = package_of(kernel)
        if package not in self._of_package:
            self._of_package[package] = read_tables(package, self.device)
        return self._of_package[package]


def package_of(kernel: Kernel) -> str:
    """The package that a kernel is from: it ships the tables, and those made here are kept for it."""
    return type(kernel).__module__.partition(".")[0]


def read_tables(package: str, device: Device) -> tuple[Table, ...]:
    """This machine's measurements, then the shipped table for the card, then those for cards of its architecture."""
    measured = read_table(KIND, _key(package, device))
    shipped = [(card, table) for card, table in _shipped(package) if table["arch"] == device.arch]
    shipped.sort(key=lambda entry: entry[0] != device.name)
    found = [(HERE, measured), *((f"shipped for {card}", table) for card, table in shipped)]
    return tuple(Table(source, table.get("choices", {}), table.get("times", {})) for source, table in found)


def remember(
    package: str, device: Device, choices: Mapping[str, str] | None = None, times: Times | None = None
) -> None:
    """Adds measured variants, by work, and times to this machine's table for a package and a class of device."""
    update_table(KIND, _key(package, device), {"choices": choices or {}, "times": times or {}})


def forget(package: str, device: Device) -> None:
    """Empties this machine's table for a package and a class of device."""
    Cache(KIND).put(_key(package, device), b"{}")


def _key(package: str, device: Device) -> str:
    """Of what a measurement depends on: changed kernels, another compiler or another card have a table of their own."""
    backends = registry.current().backends.values()
    own = (backend for backend in backends if getattr(backend.plugin, "__name__", "").partition(".")[0] == package)
    versions = library_versions(sorted({library for backend in own for library in backend.libraries}))
    return Cache.key(package, source_hash(sys.modules[package]), versions, device.device_class)


@cache
def _shipped(package: str) -> Sequence[tuple[str, Mapping[str, Any]]]:
    """Each shipped table, once for each card that it is for; none where the kernels' module is no package.

    That of a script, or of a notebook, is `__main__`, of which Python may know no more than the name.
    """
    if getattr(getattr(sys.modules[package], "__spec__", None), "submodule_search_locations", None) is None:
        return ()
    folder = files(package) / "tunings"
    found = sorted(folder.iterdir(), key=lambda file: file.name) if folder.is_dir() else ()
    tables = [json.loads(file.read_text("utf-8")) for file in found]
    return [(card, table) for table in tables for card in table["cards"]]
