"""What came of kernels' smoke cases on this machine, on record in core's cache: `auto` takes no kernel that failed.

Enters: a kernel's op and name, the case that failed. Leaves: the failure, as long as kernel, libraries and device are
those that it is about. Reading is one small file for each package; damaged, it says nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from kernelmux.contract.cache import Cache, library_versions, read_table, source_hash, update_table
from kernelmux.contract.device import Device
from kernelmux.contract.kernel import Kernel
from kernelmux.contract.registry import Registry
from kernelmux.graph.graph import case_node
from kernelmux.graph.ops import OPS

KIND = "smoke"
"""The folder of core's cache."""


@dataclass
class Record:
    """The record for one device; an entry is `{"silu torch:f32": {"passed": bool, "case": str, "date": str}}`."""

    registry: Registry
    device: Device
    _keys: dict[tuple[str, type[Kernel]], str] = field(default_factory=dict)
    _tables: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _kernels: dict[tuple[str, str], Kernel | None] = field(default_factory=dict)

    def failure(self, op: str, name: str, kernel: Kernel) -> str:
        """Why a kernel, `backend:kernel`, is not to be trusted with an op, and what tries it again; else nothing."""
        entry = self._entry(op, name, kernel)
        if entry.get("passed", True):
            return ""
        words = ["kernelmux", "check", "--kernel", name, "--op", op, "--smoke"]
        words += ["--device", self.device.kind] if self.device.kind != "cpu" else []
        when, case = entry.get("date", "?"), entry.get("case", "?")
        return f"its smoke cases failed here on {when} ({case}): {shlex.join(words)} runs them again"

    def passed(self, op: str, name: str) -> bool:
        """Whether all smoke cases of an op are known to have passed."""
        kernel = self._find(op, name)
        return kernel is not None and self._entry(op, name, kernel).get("passed") is True

    def note(self, op: str, name: str, case: str = "") -> None:
        """Puts it on record which smoke case failed, or what else did; nothing where all have passed."""
        if (kernel := self._find(op, name)) is not None:
            entry = {"passed": not case, "case": case, "date": date.today().isoformat()}
            key = self._key(name, kernel)
            update_table(KIND, key, {f"{op} {name}": entry})
            self._tables.pop(key, None)

    def _entry(self, op: str, name: str, kernel: Kernel) -> Mapping[str, Any]:
        key = self._key(name, kernel)
        if key not in self._tables:
            self._tables[key] = read_table(KIND, key)
        return dict(self._tables[key].get(f"{op} {name}", {}))

    def _key(self, name: str, kernel: Kernel) -> str:
        """Of what the cases' outcome depends on: a changed kernel, another library or card begins anew."""
        backend = self.registry.backends[name.partition(":")[0]]
        known = backend.name, type(kernel)
        if known not in self._keys:
            versions = library_versions(sorted(backend.libraries))
            parts = backend.name, backend.version, source_hash(kernel), versions, self.device.device_class
            self._keys[known] = Cache.key(*parts)
        return self._keys[known]

    def _find(self, op: str, name: str) -> Kernel | None:
        """The kernel of that name, by the first case that it takes; None where it takes none."""
        if (op, name) not in self._kernels:
            backend, nodes = name.partition(":")[0], map(case_node, OPS[op].cases())
            offers = (self.registry.offer(node, self.device, only=backend).kernels for node in nodes)
            self._kernels[op, name] = next((kernels[name] for kernels in offers if name in kernels), None)
        return self._kernels[op, name]
