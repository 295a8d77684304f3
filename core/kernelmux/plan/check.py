"""What a policy file says that cannot be meant: names of nothing, rules that never hold, assertions that fail.

Enters: a policy, the registry and, if there is one, a model's graph. Leaves: findings for a person or a CI job.
"""

from __future__ import annotations

from kernelmux.contract.device import Device
from kernelmux.contract.registry import Registry
from kernelmux.errors import PlanError, PolicyError
from kernelmux.graph.graph import Graph
from kernelmux.plan.names import Finding, absent_names, unknown_kernels, unreached
from kernelmux.plan.plan import make_plan
from kernelmux.plan.requirements import tuned_elsewhere, unmatched, unserved
from kernelmux.policy.policy import Policy


def check_policy(policy: Policy, registry: Registry, device: Device, graph: Graph | None = None) -> list[Finding]:
    """Every finding, by line. With a graph also all that its plan would tell, and requirements that fail."""
    found = [finding for finding in absent_names(policy, registry, device) if graph or finding.weight != "here"]
    found += unknown_kernels(policy, registry, device, {})
    sound = not any(finding.weight == "error" for finding in found)
    found += [finding for *_, finding in unreached(policy)]
    if graph is not None and sound:
        try:
            plan = make_plan(graph, policy, registry, device)
        except (PlanError, PolicyError) as error:
            found.append(Finding.of(error))
        else:
            found += [elsewhere] if (elsewhere := tuned_elsewhere(policy, device)) else []
            where = f"{graph.name} on {device.device_class}"
            for name, line in unmatched(plan):
                found.append(Finding(line, f"{name.partition(' (')[0]} matches no node of {where}"))
            for index, said in unserved(plan):
                name = policy.where(index).partition(" (")[0]
                at = policy.line("defaults") if index is None else policy.line("rule", index)
                found.append(Finding(at or 1, f"{name}: {said}"))
    return sorted(found, key=lambda finding: finding.line)
