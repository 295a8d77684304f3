"""Finds backends through entry points, checks them, and quarantines the broken.

Enters: the entry point group `kernelmux.backends`. Leaves: a Registry that can be asked for kernels. Each backend is
loaded and asked by itself, so that one that fails leaves the others working.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import Any

import pluggy

from kernelmux.contract.answers import Offer, checked_answer, checked_classes, checked_list, dispatch
from kernelmux.contract.brought import add_format, add_op, forget_brought, known, make_known
from kernelmux.contract.device import Device
from kernelmux.contract.hookspecs import CONTRACT, Hooks
from kernelmux.contract.installed import ambiguous, libraries, wanted_backends
from kernelmux.contract.kernel import EVERY_OP, Declined, Kernel
from kernelmux.contract.names import check_backend_name
from kernelmux.errors import BackendError, contained, named, nearest, printable, where_raised
from kernelmux.graph.formats import Format
from kernelmux.graph.graph import TensorNode
from kernelmux.graph.ops import OPS, Op

OWN_HOOKS = tuple(name for name in vars(Hooks) if not name.startswith("_"))


@dataclass
class Backend:
    """An installed backend: its plugin, or why it is quarantined."""

    name: str
    version: str
    plugin: object | None = None
    libraries: tuple[str, ...] = ()
    """The distributions that it requires: their versions are part of a plan's fingerprint."""
    fault: str = ""
    """One line; empty while the backend works."""
    trace: str = ""

    @property
    def last_resort(self) -> bool:
        """Whether it says that others had better run what they can, where nobody asks for it: `LAST_RESORT = True`."""
        return bool(getattr(self.plugin, "LAST_RESORT", False))


@dataclass
class Registry:
    """The backends at hand, in the order in which they were found."""

    backends: dict[str, Backend] = field(default_factory=dict)
    allowed: tuple[str, ...] = ()
    """The backends that KERNELMUX_BACKENDS names, where it narrows them down."""
    _hooks: pluggy.PluginManager = field(default_factory=lambda: _plugin_manager(), repr=False)
    _own_hooks: dict[str, Mapping[str, pluggy.HookImpl]] = field(default_factory=dict, repr=False)
    _classes: dict[str, tuple[type[Kernel], ...]] = field(default_factory=dict, repr=False)
    _refusals: dict[tuple[str, Device], Declined | None] = field(default_factory=dict, repr=False)
    _editions: Counter[str] = field(default_factory=Counter, repr=False)
    """How many backends of a name were taken out."""

    @property
    def unnamed(self) -> list[str]:
        """The backends in the order in which they follow those that a policy names: by name, the last resort last."""
        return sorted(self.backends, key=lambda name: (self.backends[name].last_resort, name))

    def register(
        self, plugin: object, name: str | None = None, version: str = "", libraries: Iterable[str] = ()
    ) -> Backend:
        """Adds a backend; a broken one is quarantined, its fault on record. BackendError on a repeated name."""
        name = name or own_name(plugin)
        if name in self.backends:
            raise BackendError(
                f"backend {name!r} is registered already; each needs a name of its own, or takes its place by "
                "registry.replace"
            )
        backend = Backend(name, version or str(getattr(plugin, "__version__", "?")), plugin, tuple(libraries))
        self.backends[name] = backend
        before = known()
        try:
            check_backend_name(name)
            _check_contract(plugin)
            self._hooks.register(plugin, name=name)
            self._own_hooks[name] = self._implementations(plugin)
            self._bring(name)
            self._check_hooks(name, plugin)
        except BaseException as error:
            make_known(*before)
            self._quarantine(backend, error)
        return backend

    def unregister(self, name: str) -> Backend:
        """Takes a backend out, with the ops and formats that it brought; BackendError where there is none.

        Plans that have kernels of its keep them.
        """
        if name not in self.backends:
            raise BackendError(f"no backend {name!r} is registered{nearest(name, self.backends)}")
        taken = self.backends.pop(name)
        self.allowed = tuple(other for other in self.allowed if other != name)
        self._editions[name] += 1
        self._forget(name)
        self._classes.pop(name, None)
        self._refusals = {key: refusal for key, refusal in self._refusals.items() if key[0] != name}
        # What it brought may be another's too, or what another's ops are made of.
        forget_brought()
        for other in self.working:
            try:
                self._bring(other)
            except BaseException as error:
                self._quarantine(self.backends[other], error)
        return taken

    def load(self, entry: EntryPoint) -> Backend:
        """Imports and registers the backend of an entry point."""
        version = entry.dist.version if entry.dist else ""
        try:
            plugin = entry.load()
        except BaseException as error:
            backend = self.backends[entry.name] = Backend(entry.name, version)
            self._quarantine(backend, error)
            return backend
        return self.register(plugin, entry.name, version, libraries(entry))

    @property
    def working(self) -> tuple[str, ...]:
        return tuple(name for name, backend in self.backends.items() if not backend.fault)

    def ops(self, backend: str) -> tuple[str, ...]:
        """The ops that a backend has kernels or a hook for."""
        classes = self.classes(backend)
        own = {} if self.backends[backend].fault else self._own_hooks[backend]
        return tuple(
            op
            for op in OPS
            if f"dispatch_{op}" in own or any(op in made.ops or EVERY_OP in made.ops for made in classes)
        )

    def classes(self, backend: str) -> tuple[type[Kernel], ...]:
        """A backend's kernel classes; none of a quarantined one, as one is for which asking fails."""
        if self.backends[backend].fault:
            return ()
        if backend not in self._classes:
            self._classes[backend] = ()
            if (own := self._own_hooks.get(backend, {}).get("kernel_classes")) is not None:
                try:
                    self._classes[backend] = checked_classes(backend, own.function())
                except BaseException as error:
                    self._quarantine(self.backends[backend], error)
        return self._classes[backend]

    def offer(self, node: TensorNode, device: Device, only: str = "") -> Offer:
        """Every backend's answer for a node on a device, or one's; one that raises or answers nonsense is set aside."""
        kernels: dict[str, Kernel] = {}
        declined: dict[str, Declined] = {}
        for name in [only] if only else self.working:
            try:
                theirs = Offer({}, {}) if self.backends[name].fault else self._answer(name, node, device)
            except BaseException as error:
                self._quarantine(self.backends[name], error)
            else:
                for kernel in theirs.kernels.values() if self._editions[name] else ():
                    kernel.edition = self._editions[name]
                kernels.update(theirs.kernels)
                declined.update(theirs.declined)
            if fault := self.backends[name].fault:
                declined[name] = Declined(f"quarantined: {fault}", "not offered")
        return Offer(kernels, declined)

    def _answer(self, backend: str, node: TensorNode, device: Device) -> Offer:
        own = self._own_hooks[backend].get(f"dispatch_{node.op}")
        if (refused := self.device_refusal(backend, device)) is not None:
            return Offer({}, {backend: refused})
        if own is not None:
            told = {"node": node, "device": device, **node.contract.arguments(node)}
            answer = own.function(*(told[key] for key in own.argnames))
        else:
            answer = dispatch(backend, self.classes(backend), node, device)
        if not answer and isinstance(answer, list):
            return Offer({}, {backend: Declined(f"{backend} has no {node.op}", "not offered")})
        return checked_answer(backend, f"{backend}.dispatch_{node.op}", answer)

    def device_refusal(self, backend: str, device: Device) -> Declined | None:
        """Why a backend has nothing for a device; None where its kernels are to be asked."""
        key = backend, device
        if key not in self._refusals:
            answer = self._own(backend, "device_refusal", device)
            if not (answer is None or isinstance(answer, Declined)):
                raise BackendError(f"{backend}.device_refusal returned {answer!r:.40}: it must return Declined or None")
            self._refusals[key] = answer
        return self._refusals[key]

    def _bring(self, backend: str) -> None:
        """Adds the formats and ops that a backend brings."""
        for brought in self._brought(backend, "new_formats", Format):
            add_format(brought)
        for op in self._brought(backend, "new_ops", Op):
            add_op(op)

    def _check_hooks(self, name: str, plugin: object) -> None:
        """BackendError for a `dispatch_` attribute that is no hook, for want of the marker or of such an op."""
        if not self._hooks.get_hookcallers(plugin):
            raise BackendError(f"{name} implements no hook: mark kernel_classes, or dispatch_<op>, with @hookimpl")
        known = [*(f"dispatch_{op}" for op in OPS), *OWN_HOOKS]
        for attribute in dir(plugin):
            marked = self._hooks.parse_hookimpl_opts(plugin, attribute) is not None
            if (marked or attribute.startswith("dispatch_")) and attribute not in known:
                raise BackendError(f"{name}.{attribute} is no hook{nearest(attribute, known)}")
            if attribute in known and not marked:
                raise BackendError(f"{name}.{attribute} is not marked: put @hookimpl over it")
        for op, contract in OPS.items():
            own = self._own_hooks[name].get(f"dispatch_{op}")
            told = ("node", "device", *contract.told)
            if own is not None and (odd := set(own.argnames) - set(told)):
                raise BackendError(f"{name}.dispatch_{op} asks for {min(odd)!r}{nearest(min(odd), told)}")

    def _brought(self, backend: str, hook: str, kind: type) -> Sequence[Any]:
        """What a backend's hook of that name lists; nothing where it has none."""
        listed = hook in self._own_hooks[backend]
        return checked_list(f"{backend}.{hook}()", self._own(backend, hook), kind) if listed else ()

    def _own(self, backend: str, hook: str, *arguments: object) -> Any:
        """What a backend's hook of that name returns; None where it has none."""
        own = self._own_hooks.get(backend, {}).get(hook)
        return None if own is None else own.function(*arguments[: len(own.argnames)])

    def _implementations(self, plugin: object) -> Mapping[str, pluggy.HookImpl]:
        """A registered plugin's hook implementations, by the hook's name."""
        callers = self._hooks.get_hookcallers(plugin) or ()
        return {caller.name: impl for caller in callers for impl in caller.get_hookimpls() if impl.plugin is plugin}

    def _quarantine(self, backend: Backend, error: BaseException) -> None:
        at = "" if isinstance(contained(error), BackendError) else f" ({where_raised(error)})"
        backend.fault = printable(" ".join(f"{named(error)}{at}".split()))
        backend.trace = "".join(traceback.format_exception(error))
        self._forget(backend.name)

    def _forget(self, backend: str) -> None:
        """Its hooks are asked no more."""
        self._own_hooks.pop(backend, None)
        if self._hooks.has_plugin(backend):
            self._hooks.unregister(name=backend)


def own_name(plugin: object) -> str:
    """What a backend is called unless it is told: as its module, without the project's prefix."""
    return str(getattr(plugin, "__name__", type(plugin).__name__)).removeprefix("kernelmux_")


def _plugin_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("kernelmux")
    manager.add_hookspecs(Hooks)
    return manager


def _check_contract(plugin: object) -> None:
    stated = getattr(plugin, "CONTRACT", None)
    if stated != CONTRACT:
        asked = "states no contract version" if stated is None else f"was built for contract {stated!r}"
        raise BackendError(f"the backend {asked}, this kernelmux speaks {CONTRACT}: set CONTRACT, or install its match")


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
    wanted, only = wanted_backends()
    registry.allowed = tuple(wanted) if only else ()
    for name, owners in wanted.items():
        if len(owners) == 1:
            registry.load(next(iter(owners.values())))
        else:
            registry.backends[name] = Backend(name, "", fault=ambiguous(name, list(owners)))
    return registry


def register(backend: object, name: str | None = None) -> Backend:
    """Adds a backend to this process, as a notebook would; BackendError at once if it is broken."""
    record = current().register(backend, name)
    if record.fault:
        del current().backends[record.name]
        raise BackendError(f"{record.name}: {record.fault}")
    return record


def unregister(name: str) -> None:
    """Takes a backend out of this process; BackendError where there is none of that name."""
    current().unregister(name)


def replace(backend: object, name: str | None = None) -> Backend:
    """Adds a backend in place of the one of its name, if there is one: for a notebook's cell that is run again.

    BackendError where it is broken, and the one before stays. Plans that were made with that one keep its kernels.
    """
    name = name or own_name(backend)
    before = current().unregister(name) if name in current().backends else None
    try:
        return register(backend, name)
    except BackendError:
        if before is not None and before.fault:
            current().backends[name] = before
        elif before is not None:
            current().register(before.plugin, name, before.version, before.libraries)
        raise


@contextmanager
def isolated(**backends: object) -> Iterator[Registry]:
    """Within the block, only the backends given here exist, and what they bring: for tests."""
    global _current
    before, existed = _current, known()
    _current = Registry()
    try:
        forget_brought()
        for name, plugin in backends.items():
            _current.register(plugin, name)
        yield _current
    finally:
        _current = before
        make_known(*existed)
