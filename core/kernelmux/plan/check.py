"""What a policy file says that cannot be meant: names of nothing, rules that never hold, assertions that fail.

Enters: a policy, the registry and, if there is one, a model's graph. Leaves: findings for a person or a CI job.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kernelmux.contract.device import Device
from kernelmux.contract.registry import Registry
from kernelmux.errors import KernelmuxError, PlanError, PolicyError, nearest
from kernelmux.graph.graph import Graph, case_node
from kernelmux.graph.ops import OPS
from kernelmux.plan.names import OFFICIAL
from kernelmux.plan.plan import make_plan
from kernelmux.policy.policy import Policy


@dataclass(frozen=True)
class Finding:
    """One fault of a policy: its line, and what is wrong."""

    line: int
    message: str

    @classmethod
    def of(cls, error: KernelmuxError) -> Finding:
        """What an error says of a policy."""
        return cls(error.line or 1, str(error).removeprefix(f"{error.file}:{error.line}: "))


def check_policy(policy: Policy, registry: Registry, device: Device, graph: Graph | None = None) -> list[Finding]:
    """Every finding, by line. With a graph also rules that matched none of its nodes, and requirements that fail."""
    found = [*_unknown_names(policy, registry, device), *_unreachable(policy)]
    if graph is not None and not found:
        found += _against(policy, registry, device, graph)
    return sorted(found, key=lambda finding: finding.line)


def kernel_names(registry: Registry, device: Device) -> set[str]:
    """Every kernel that some backend has, asked with one case of each op and weight format."""
    names: set[str] = set()
    for op in OPS.values():
        for case in op.cases():
            node = case_node(case)
            offer = registry.offer(node, device)
            names.update(name for name in (*offer.kernels, *offer.declined) if ":" in name)
    return names


def _unknown_names(policy: Policy, registry: Registry, device: Device) -> Iterator[Finding]:
    known = kernel_names(registry, device)
    document = policy.document
    lists = [(policy.lines[i], rule.use, rule.on_unsupported == "next") for i, rule in enumerate(document.rule)]
    lists += [(policy.require_lines[i], required.kernel, False) for i, required in enumerate(document.require)]
    lists += [(policy.defaults_line or 1, document.defaults.use, False), (policy.forbid_line, document.forbid, False)]
    for line, names, optional in lists:
        for name in names:
            backend = name.partition(":")[0]
            if backend not in registry.backends:
                if not optional and backend not in OFFICIAL:
                    yield Finding(line, f"unknown backend {backend!r}{nearest(backend, registry.backends)}")
            elif ":" in name and name not in known and not registry.backends[backend].fault:
                theirs = [kernel for kernel in known if kernel.startswith(f"{backend}:")]
                yield Finding(line, f"unknown kernel {name!r}{nearest(name, theirs)}")


def _unreachable(policy: Policy) -> Iterator[Finding]:
    rules = policy.document.rule
    for index, rule in enumerate(rules):
        for earlier in range(index):
            if rules[earlier].covers(rule):
                yield Finding(
                    policy.lines[index],
                    f"rule {index + 1} is never reached: {policy.where(earlier)} matches all that it does",
                )
                break


def _against(policy: Policy, registry: Registry, device: Device, graph: Graph) -> Iterator[Finding]:
    try:
        plan = make_plan(graph, policy, registry, device)
    except (PlanError, PolicyError) as error:
        yield Finding.of(error)
        return
    nodes = [
        meant
        for schedule in plan.schedules.values()
        for step in schedule.steps
        for meant in plan.nodes_meant(step, schedule.rows(step.node))
    ]
    for index in range(len(policy.document.rule)):
        if not any(policy.match(node, rows, device) == index for node, rows in nodes):
            yield Finding(policy.lines[index], f"rule {index + 1} matches no node of {graph.name}")
    for index, required in enumerate(policy.document.require):
        if not any(required.matches(node, rows, device) for node, rows in nodes):
            yield Finding(policy.require_lines[index], f"requirement {index + 1} matches no node of {graph.name}")
