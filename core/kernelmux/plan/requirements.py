"""What a policy requires of a plan: placements that must hold whatever the rules chose.

Enters: a Plan. Leaves: a PlanError that names the broken requirement and every node that breaks it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelmux.errors import PlanError

if TYPE_CHECKING:
    from kernelmux.plan.plan import Plan


def check_requirements(plan: Plan) -> None:
    """PlanError naming the first requirement that does not hold, with every node that breaks it."""
    for index, broken in enumerate(broken_requirements(plan)):
        if broken:
            required = plan.policy.document.require[index]
            shown = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
            file, line = plan.policy.source, plan.policy.require_lines[index]
            wanted = " or ".join(required.kernel)
            raise PlanError(f"{file}:{line}: the policy requires {wanted}, but {shown}", file=file, line=line)


def broken_requirements(plan: Plan) -> list[list[str]]:
    """For each requirement of the policy, `node has kernel` of every node that breaks it.

    A fused node answers for the plain ones that it stands for.
    """
    found: list[list[str]] = []
    for required in plan.policy.document.require:
        broken: dict[str, None] = {}
        for schedule in plan.schedules.values():
            for step in schedule.steps:
                if {step.choice.name, step.choice.name.partition(":")[0]} & set(required.kernel):
                    continue
                top = schedule.rows(step.node)
                if any(required.matches(node, rows, plan.device) for node, rows in plan.nodes_meant(step, top)):
                    broken[f"{step.node.name} has {step.choice.name} at up to {top} rows"] = None
        found.append(list(broken))
    return found
