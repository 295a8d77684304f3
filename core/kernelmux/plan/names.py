"""Whether a policy can have what it names: backends that exist and work, kernels that they have, none that it forbids.

Enters: a policy, a registry. Leaves: findings; a plan raises some and tells others, `policy check` lists them all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from kernelmux.contract.device import Device
from kernelmux.contract.kernel import EVERY_OP
from kernelmux.contract.registry import Registry
from kernelmux.errors import KernelmuxError, PolicyError, nearest
from kernelmux.graph.graph import case_node
from kernelmux.graph.ops import OPS
from kernelmux.policy.grammar import AUTO, PARTS, Rule
from kernelmux.policy.policy import Policy

OFFICIAL = ("cupy", "numba", "reference", "torch", "triton")
"""Backends of this project: a policy may name one that is not installed, is told so, and goes on without it."""

Weight = Literal["error", "note", "here"]
"""What a plan does about a finding: it raises it, or tells of it; `here` is the machine's fault, not the policy's."""


@dataclass(frozen=True)
class Finding:
    """One fault of a policy: its line, and what is wrong."""

    line: int
    message: str
    weight: Weight = "error"
    place: str = ""
    """What it is told with, where its message does not say it: file and line, or the option."""
    name: str = ""
    """The kernel or backend that it is about."""

    @classmethod
    def of(cls, error: KernelmuxError) -> Finding:
        """What an error says of a policy."""
        return cls(error.line or 1, str(error).removeprefix(f"{error.file}:{error.line}: "))

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place else self.message

    def error(self, policy: Policy) -> PolicyError:
        """The finding, to be raised."""
        kernel, backend = self.name if ":" in self.name else None, self.name.partition(":")[0]
        return PolicyError(str(self), file=policy.source, line=self.line, kernel=kernel, backend=backend)


class _List(NamedTuple):
    """A list of names: how messages call its table, both lines, how much it matters that they can be had, its rule."""

    table: str
    line: int
    key_line: int
    names: Sequence[str]
    weight: Weight
    rule: Rule | None
    place: str
    wanting: bool
    """Whether it asks for kernels of nodes on the device, come what may."""

    @property
    def unknown(self) -> Weight:
        """What is to be made of a name of nothing: a requirement will fail by itself."""
        return "note" if self.table.startswith("requirement") else "error"


def _lists(policy: Policy, device: Device) -> Iterator[_List]:
    """Every list of names in a policy; `forbid` last."""
    document, source = policy.document, policy.source
    for index, rule in enumerate(document.rule):
        table, option = policy.where(index), index < len(policy.options)
        line, key_line = policy.line("rule", index) or 0, policy.line("rule", index, "use") or 0
        weight: Weight = "error" if option or "error" in (rule.on_unsupported, rule.on_error) else "note"
        place = table if option else f"{source}:{key_line}"
        wanting = rule.is_for(device) and rule.on_unsupported != "next"
        yield _List(table, line, key_line, _kernels(rule.use), weight, rule, place, wanting)

    def of(table: str, names: Sequence[str], *path: int | str, wanting: bool = False) -> _List:
        line = policy.line(*path) or 1
        return _List(f"{table} ({source}:{line})", line, line, names, "note", None, f"{source}:{line}", wanting)

    for index, required in enumerate(document.require):
        yield of(f"requirement {index + 1}", required.kernel, "require", index, "kernel")
    yield of("defaults", _kernels(document.defaults.use), "defaults", "use", wanting=True)
    yield of("forbid", document.forbid, "forbid")


def _kernels(words: Sequence[str]) -> Sequence[str]:
    return [word for word in words if word not in (AUTO, PARTS)]


def absent_names(policy: Policy, registry: Registry, device: Device) -> Iterator[Finding]:
    """Backends that do not exist, are not installed or are quarantined, and whatever the policy itself forbids.

    A rule that says `next` may name a backend that nobody has heard of.
    """
    forbidden = policy.document.forbid
    for of in _lists(policy, device):
        option = of.place == of.table
        for name in of.names:
            backend = name.partition(":")[0]
            known = registry.backends.get(backend)
            optional = (backend in OFFICIAL and not option) or (of.rule and of.rule.on_unsupported == "next")
            if known is None and not optional:
                said = f"unknown backend {backend!r}{nearest(backend, registry.backends)}"
                yield Finding(of.key_line, said, of.unknown, of.place, name)
            asks = f"{of.table} {'names' if of.names is forbidden else 'asks for'} {name}"
            whose = "which" if name == backend else f"and {backend}"
            if known is None and optional and of.wanting and not {name, backend} & set(forbidden):
                said = f"{asks}, {whose} is not installed: pip install kernelmux-{backend}"
                yield Finding(of.line, said, "here", name=name)
            if known is not None and known.fault:
                yield Finding(of.line, f"{asks}, {whose} is quarantined: {known.fault}", of.weight, name=name)
            if of.names is not forbidden and {name, backend} & set(forbidden):
                where = f"forbid ({policy.source}:{policy.line('forbid')})"
                yield Finding(of.line, f"{asks}, which {where} excludes", of.weight, name=name)


def unknown_kernels(
    policy: Policy,
    registry: Registry,
    device: Device,
    seen: Mapping[str, set[str]],
    rules: Collection[int | None] | None = None,
) -> Iterator[Finding]:
    """Kernels that the policy names, of backends that work, and that these do not have for the rule's ops.

    `seen` are kernels that some answer has mentioned, with the ops that it was about; `rules` the only ones to look at.
    """
    known: Mapping[str, set[str]] = seen
    meant = None if rules is None else [policy.document.rule[index] for index in rules if index is not None]
    for of in _lists(policy, device):
        if of.rule is not None and meant is not None and not any(of.rule is rule for rule in meant):
            continue
        ops = set((of.rule and of.rule.op) or OPS)
        for name in of.names:
            backend = name.partition(":")[0]
            if ":" not in name or backend not in registry.working or known.get(name, set()) & ops:
                continue
            if known is seen:
                known = _all_kernels(registry, device, seen)
            theirs = {kernel: its for kernel, its in known.items() if kernel.startswith(f"{backend}:")}
            # Of a backend that does not say what it has nobody can tell.
            if theirs and not theirs.get(name, set()) & ops:
                fitting = [kernel for kernel, its in theirs.items() if its & ops]
                whose = f" of {' and '.join(sorted(ops))}" if name in theirs else ""
                said = f"unknown kernel {name!r}{whose}{nearest(name, fitting)}"
                yield Finding(of.key_line, said, of.unknown, of.place, name)


def _all_kernels(registry: Registry, device: Device, seen: Mapping[str, set[str]]) -> Mapping[str, set[str]]:
    """Every kernel that a backend lists, or mentions when it is asked with the cases of each op; and its ops."""
    found = defaultdict(set, {name: set(ops) for name, ops in seen.items()})
    for backend in registry.working:
        for made in registry.classes(backend):
            found[f"{backend}:{made.name}"].update(OPS if EVERY_OP in made.ops else made.ops)
    for op in OPS.values():
        for case in op.cases():
            for name in registry.offer(case_node(case), device).names:
                found[name].add(op.name)
    return found


def unreached(policy: Policy) -> Iterator[tuple[int, int, Finding]]:
    """The rules behind one that matches all that they do: its index, that of the one before, and what to say.

    Not those that nobody asked for, as the default policy's.
    """
    rules = policy.document.rule
    for index, rule in enumerate(rules):
        before = next((earlier for earlier in range(index) if rules[earlier].covers(rule)), None)
        if before is not None and policy.is_asked_for(index):
            name = policy.where(index).partition(" (")[0]
            said = f"{name} is never reached: {policy.where(before)} matches all that it does"
            yield index, before, Finding(policy.line("rule", index) or 0, said)
