"""`kernelmux plan`: which kernel each node gets, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelmux.cli.common import (
    DeviceName,
    Json,
    ModelPath,
    PolicyPath,
    Use,
    human_bytes,
    make_plan,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from kernelmux.plan import Plan, Schedule


def plan(
    model: ModelPath,
    policy: PolicyPath = None,
    use: Use = None,
    device: DeviceName = "cpu",
    rows: Annotated[
        int, typer.Option("--rows", min=1, help="Show the choices for this many token rows: 1 is decode.")
    ] = 1,
    json: Json = False,
) -> None:
    """Show the kernel of every node, the reason, and who was passed over."""
    from kernelmux.model import load

    made = make_plan(load(model), policy, use, device)
    schedule = made.schedule(rows, rows)
    if json:
        print_json(describe(made, schedule))
        return
    cells = [
        (step.node.name, step.node.op, step.choice.name, step.choice.reason, _losers(step.choice.rejected))
        for step in schedule.steps
    ]
    print_table(("node", "op", "kernel", "reason", "passed over"), cells)
    typer.echo("")
    for line in summary(made, schedule):
        typer.echo(line)


def describe(plan: Plan, schedule: Schedule) -> dict[str, Any]:
    """The plan at one row count, for a script."""
    return {
        "fingerprint": plan.fingerprint,
        "graph": plan.graph.name,
        "policy": plan.policy.source,
        "device": plan.device.device_class,
        "rows": schedule.m,
        "buckets": plan.buckets,
        "launches": schedule.launches,
        "conversions": schedule.conversions,
        "arena_bytes": schedule.layout.nbytes,
        "packed_bytes": plan.packed_bytes,
        "nodes": [
            {
                "name": step.node.name,
                "op": step.node.op,
                "kernel": step.choice.name,
                "reason": step.choice.reason,
                "rejected": [
                    {"kernel": loser.kernel, "reason": loser.reason, "kind": loser.kind}
                    for loser in step.choice.rejected
                ],
            }
            for step in schedule.steps
        ],
    }


def summary(plan: Plan, schedule: Schedule) -> list[str]:
    """A few lines: how many nodes of each op each kernel got, and what the plan needs."""
    from kernelmux.plan import kernel_counts

    lines = []
    for op, kernels in kernel_counts(schedule).items():
        total = sum(kernels.values())
        lines.append(f"{op:<10} {', '.join(f'{count}/{total} {name}' for name, count in kernels.items())}")
    lines.append(
        f"{schedule.launches} launches at up to {schedule.m} rows ({schedule.conversions} conversions); "
        f"buckets up to {', '.join(str(top) for top in plan.buckets)} rows; "
        f"weights {human_bytes(plan.packed_bytes)}, activations {human_bytes(schedule.layout.nbytes)}; "
        f"fingerprint {plan.fingerprint}"
    )
    return lines


def _losers(rejected: Any) -> str:
    return "; ".join(f"{loser.kernel}: {loser.reason}" for loser in rejected if loser.kind != "outranked")
