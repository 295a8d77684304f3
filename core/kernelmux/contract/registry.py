"""Finds backends through entry points, checks them, and quarantines the broken.

Enters: the entry point group `kernelmux.backends`. Leaves: a Registry that can be asked for kernels. Each backend is
loaded and asked by itself, so that one that fails leaves the others working.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from kernelmux.contract.device import Device
from kernelmux.contract.hookspecs import CONTRACT, Declined, Hooks, Kernel
from kernelmux.errors import BackendError, nearest
from kernelmux.graph.graph import TensorNode, case_node
from kernelmux.graph.ops import CORE_OPS, OPS, Fused

GROUP = "kernelmux.backends"
ALLOW = "KERNELMUX_BACKENDS"
"""Environment variable: a comma-separated list of the only backends to load."""


@dataclass
class Backend:
    """An installed backend: its plugin, or why it is quarantined."""

    name: str
    version: str
    plugin: object | None = None
    fault: str = ""
    """One line; empty while the backend works."""
    trace: str = ""


@dataclass(frozen=True)
class Offer:
    """What all backends answered for one node: kernels by full name, best first in each backend, and refusals."""

    kernels: Mapping[str, Kernel]
    declined: Mapping[str, Declined]


@dataclass
class Registry:
    """The backends at hand, in the order in which they were found."""

    backends: dict[str, Backend] = field(default_factory=dict)
    _hooks: pluggy.PluginManager = field(default_factory=lambda: _plugin_manager(), repr=False)
    _arguments: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    """What the hooks of ops are told that backends brought: pluggy knows only those of Hooks."""

    def register(self, plugin: object, name: str | None = None, version: str = "") -> Backend:
        """Adds a backend; a broken one is quarantined, its fault on record. BackendError on a repeated name."""
        name = name or str(getattr(plugin, "__name__", type(plugin).__name__)).removeprefix("kernelmux_")
        if name in self.backends:
            raise BackendError(f"backend {name!r} is registered already; each needs a name of its own")
        backend = Backend(name, version or str(getattr(plugin, "__version__", "?")), plugin)
        self.backends[name] = backend
        before = set(OPS)
        try:
            _check_contract(plugin)
            self._add_ops(plugin)
            self._hooks.register(plugin, name=name)
            self._check_hooks(name, plugin)
        except Exception as error:
            for op in OPS.keys() - before:
                del OPS[op], self._arguments[op]
            self._quarantine(backend, error)
        return backend

    def load(self, entry: EntryPoint) -> Backend:
        """Imports and registers the backend of an entry point."""
        version = entry.dist.version if entry.dist else ""
        try:
            plugin = entry.load()
        except (Exception, SystemExit) as error:
            backend = self.backends[entry.name] = Backend(entry.name, version)
            self._quarantine(backend, error)
            return backend
        return self.register(plugin, entry.name, version)

    @property
    def working(self) -> tuple[str, ...]:
        return tuple(name for name, backend in self.backends.items() if not backend.fault)

    def ops(self, backend: str) -> tuple[str, ...]:
        """The ops that a backend has a hook for."""
        plugin = self.backends[backend].plugin
        return tuple(op for op in OPS if getattr(plugin, f"dispatch_{op}", None) is not None)

    def offer(self, node: TensorNode, device: Device) -> Offer:
        """Every backend's answer for a node on a device, told what the op's hook is told."""
        return self.ask(node.op, {"node": node, "device": device, **node.contract.arguments(node)})

    def ask(self, op: str, arguments: Mapping[str, Any]) -> Offer:
        """Every backend's answer for a node. A hook that raises, or answers nonsense, quarantines its backend."""
        kernels: dict[str, Kernel] = {}
        declined: dict[str, Declined] = {}
        implementations = self._implementations(op)
        for name in self.working:
            if name not in implementations:
                declined[name] = Declined(f"{name} has no {op}", "not offered")
                continue
            implementation = implementations[name]
            try:
                answer = implementation.function(*(arguments[key] for key in implementation.argnames))
                theirs, refusals = _sort_answer(name, answer)
            except Exception as error:
                self._quarantine(self.backends[name], error)
                refusals = {name: Declined(f"quarantined: {self.backends[name].fault}", "not offered")}
            else:
                kernels.update(theirs)
            declined.update(refusals)
        return Offer(kernels, declined)

    def _add_ops(self, plugin: object) -> None:
        """Adds the fused ops that a backend brings: to OPS, and a hook for each."""
        bring = getattr(plugin, "fused_ops", None)
        for op in bring() if bring else ():
            if not isinstance(op, Fused):
                raise BackendError(f"fused_ops must give Fused ops, not {type(op).__name__}")
            if op.name in OPS and type(OPS[op.name]) is not type(op):
                raise BackendError(f"it brings an op named {op.name!r}, which exists already")
            OPS[op.name] = op
            self._arguments[op.name] = ()
            try:
                node = case_node(next(op.cases()))
                arguments = ("node", *op.arguments(node), "device")
            except Exception as error:
                raise BackendError(
                    f"its op {op.name!r} has no sound first case: {type(error).__name__}: {error}"
                ) from error
            self._arguments[op.name] = arguments

    def _check_hooks(self, name: str, plugin: object) -> None:
        """BackendError for a `dispatch_` attribute that is no hook, for want of the marker or of such an op."""
        if not self._hooks.get_hookcallers(plugin):
            raise BackendError(f"{name} implements no hook: mark its dispatch functions with @hookimpl")
        known = [*(f"dispatch_{op}" for op in OPS), "fused_ops"]
        for attribute in dir(plugin):
            marked = self._hooks.parse_hookimpl_opts(plugin, attribute) is not None
            if (marked or attribute.startswith("dispatch_")) and attribute not in known:
                raise BackendError(f"{name}.{attribute} is no hook{nearest(attribute, known)}")
            if attribute in known and not marked:
                raise BackendError(f"{name}.{attribute} is not marked: put @hookimpl over it")
        for op, arguments in self._arguments.items():
            if name in (mine := self._implementations(op)) and (odd := set(mine[name].argnames) - set(arguments)):
                unknown = sorted(odd)[0]
                raise BackendError(f"{name}.dispatch_{op} asks for {unknown!r}{nearest(unknown, arguments)}")

    def _implementations(self, op: str) -> Mapping[str, pluggy.HookImpl]:
        """The implementations of an op's hook, by backend."""
        caller = getattr(self._hooks.hook, f"dispatch_{op}", None)
        return {} if caller is None else {impl.plugin_name: impl for impl in caller.get_hookimpls()}

    def _quarantine(self, backend: Backend, error: BaseException) -> None:
        backend.fault = " ".join(f"{type(error).__name__}: {error}".split())
        backend.trace = "".join(traceback.format_exception(error))
        if self._hooks.has_plugin(backend.name):
            self._hooks.unregister(name=backend.name)


def _plugin_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("kernelmux")
    manager.add_hookspecs(Hooks)
    return manager


def _check_contract(plugin: object) -> None:
    stated = getattr(plugin, "CONTRACT", None)
    if stated != CONTRACT:
        asked = "states no contract version" if stated is None else f"was built for contract {stated!r}"
        raise BackendError(f"the backend {asked}, this kernelmux speaks {CONTRACT}: set CONTRACT, or install its match")


def _sort_answer(backend: str, answer: Any) -> tuple[Mapping[str, Kernel], Mapping[str, Declined]]:
    """A hook's answer under full names; BackendError where it is not what a hook may answer."""
    kernels: dict[str, Kernel] = {}
    declined: dict[str, Declined] = {}
    if answer is None:
        answer = Declined(f"{backend} declined without a reason")
    parts: Sequence[Any] = answer if isinstance(answer, Sequence) else [answer]
    for part in parts:
        if isinstance(part, Declined):
            declined[f"{backend}:{part.kernel}" if part.kernel else backend] = part
        elif isinstance(part, Kernel):
            _check_kernel(part)
            if (full := f"{backend}:{part.name}") in kernels:
                raise BackendError(f"two kernels of this op are named {full}")
            kernels[full] = part
        else:
            raise BackendError(f"a hook answers with Kernel or Declined, not {type(part).__name__}")
    return kernels, declined


def _check_kernel(kernel: Kernel) -> None:
    """BackendError where a kernel's declarations are missing or cannot be meant."""
    name, precision = getattr(kernel, "name", None), getattr(kernel, "precision", None)
    if not (isinstance(name, str) and name and ":" not in name):
        raise BackendError(f"{type(kernel).__name__}.name must be a name without its backend, not {name!r}")
    if isinstance(precision, bool) or not isinstance(precision, int | float) or not precision >= 0:
        raise BackendError(f"{name}.precision must be a bound on the NMSE, not {precision!r}")


_current: Registry | None = None


def current() -> Registry:
    """The process's registry; on first use it loads every installed backend that KERNELMUX_BACKENDS allows."""
    global _current
    if _current is None:
        _current = discover()
    return _current


def discover() -> Registry:
    """A registry of all installed backends. BackendError where KERNELMUX_BACKENDS names one that is not installed."""
    registry = Registry()
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        if entry.name in found:
            taken = f"{entry.name} ({entry.dist.name if entry.dist else entry.value})"
            registry.backends[taken] = Backend(taken, "", fault=f"another distribution has a backend {entry.name!r}")
        else:
            found[entry.name] = entry
    allowed = list(dict.fromkeys(name.strip() for name in os.environ.get(ALLOW, "").split(",") if name.strip()))
    for name in allowed:
        if name not in found:
            raise BackendError(f"{ALLOW} names {name!r}{nearest(name, found)}")
    for name in allowed or sorted(found):
        registry.load(found[name])
    return registry


def register(backend: object, name: str | None = None) -> Backend:
    """Adds a backend to this process, as a notebook would; BackendError at once if it is broken."""
    record = current().register(backend, name)
    if record.fault:
        del current().backends[record.name]
        raise BackendError(f"{record.name}: {record.fault}")
    return record


@contextmanager
def isolated(**backends: object) -> Iterator[Registry]:
    """Within the block, only the backends given here exist, and the ops that they bring: for tests."""
    global _current
    before, ops = _current, dict(OPS)
    _current = Registry()
    try:
        for name in ops.keys() - CORE_OPS:
            del OPS[name]
        for name, plugin in backends.items():
            _current.register(plugin, name)
        yield _current
    finally:
        _current = before
        OPS.clear()
        OPS.update(ops)
