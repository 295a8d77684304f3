"""Whether the backends and kernels that a policy names exist; and what to say of those that are broken.

Enters: a policy, what the backends answered. Leaves: a PolicyError for a name of nothing, notes for the quarantined.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kernelmux.contract.registry import Registry
from kernelmux.errors import PolicyError, nearest
from kernelmux.plan.offers import Offers
from kernelmux.policy.policy import Policy

OFFICIAL = ("cupy", "numba", "reference", "torch", "triton")
"""Backends of this project: a policy may name one that is not installed, and goes on without it."""


def check_backends(policy: Policy, registry: Registry) -> None:
    """PolicyError for a backend that is neither installed nor this project's, unless its rule says `next`.

    Where a rule says `error` instead, also for one that is quarantined.
    """
    rules = policy.document.rule
    for place, line, names, rule in _named(policy):
        for name in names:
            backend = name.partition(":")[0]
            strict = None if rule is None else rules[rule].on_unsupported
            known = registry.backends.get(backend)
            if known is None and strict != "next" and not (backend in OFFICIAL and line):
                raise PolicyError(
                    f"{place}: unknown backend {backend!r}{nearest(backend, registry.backends)}",
                    file=policy.source,
                    line=line,
                    backend=backend,
                )
            if known is not None and known.fault and strict == "error":
                raise PolicyError(
                    f"{place} asks for {name}, and {backend} is quarantined: {known.fault}",
                    file=policy.source,
                    line=line,
                    backend=backend,
                )


def broken(policy: Policy, registry: Registry) -> tuple[str, ...]:
    """A line for each backend that a rule or `--use` names and that is quarantined: its rules had to do without."""
    found: dict[str, str] = {}
    for place, _, names, rule in _named(policy):
        for backend in (name.partition(":")[0] for name in names):
            if rule is not None and backend in registry.backends and (fault := registry.backends[backend].fault):
                found.setdefault(backend, f"{place} asks for {backend}, which is quarantined: {fault}")
    return tuple(found.values())


def check_kernels(policy: Policy, offers: Offers, matched: set[int | None]) -> None:
    """PolicyError for a kernel that the policy names, of a backend that works, and that no answer has mentioned.

    Rules that matched no node are left out: what they name may well exist for other graphs.
    """
    seen, asked = offers.names(), offers.ops
    for place, line, names, rule in _named(policy):
        if rule is not None and rule not in matched:
            continue
        ops = set((policy.document.rule[rule].op if rule is not None else None) or asked)
        for name in names:
            backend = name.partition(":")[0]
            theirs = [known for known, of in seen.items() if known.startswith(f"{backend}:") and of & ops]
            if ":" in name and backend in offers.registry.working and theirs and name not in theirs:
                raise PolicyError(
                    f"{place}: unknown kernel {name!r}{nearest(name, theirs)}",
                    file=policy.source,
                    line=line,
                    kernel=name,
                )


def _named(policy: Policy) -> Iterator[tuple[str, int, Sequence[str], int | None]]:
    """Each list of names: how messages call its place, its line, the names, and its rule; None outside rules."""
    document = policy.document
    for index, rule in enumerate(document.rule):
        yield policy.where(index), policy.lines[index], rule.use, index
    # Lines of what a file leaves out count as the file's all the same.
    yield policy.where(None), policy.defaults_line or 1, document.defaults.use, None
    yield f"forbid ({policy.source}:{policy.forbid_line})", policy.forbid_line or 1, document.forbid, None
