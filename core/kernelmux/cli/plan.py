"""`kernelmux plan`: which kernel each node gets, and why; two plans compared; a plan locked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelmux.cli.common import (
    DeviceAs,
    DeviceName,
    Json,
    OptionalModelPath,
    PolicyPath,
    RandomModel,
    Use,
    asked_device,
    make_plan,
    open_asked,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from kernelmux.contract.device import Device
    from kernelmux.plan.choice import Rejection
    from kernelmux.plan.plan import Plan
    from kernelmux.plan.schedule import Schedule
    from kernelmux.run.model import Model


def plan(
    model: OptionalModelPath = None,
    random: RandomModel = None,
    policy: PolicyPath = None,
    use: Use = None,
    device: DeviceName = "cpu",
    device_as: DeviceAs = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Show the choices for so many rows: 1 is decode.")] = 1,
    why: Annotated[str | None, typer.Option("--why", metavar="NODE", help="All about one node.")] = None,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--diff", metavar="A B", help="Which nodes move between two policies or lock files, and why."),
    ] = None,
    lock: Annotated[Path | None, typer.Option("--lock", metavar="FILE", help="Write the plan to a lock file.")] = None,
    json: Json = False,
) -> None:
    """Show the kernel of every node, the reason, and who was passed over."""
    opened, target = open_asked(model, random), asked_device(device, device_as)
    if diff is not None:
        before, after = (_plan_of(opened, path, use, target) for path in diff)
        _show_diff(before, after, json)
        return
    made = make_plan(opened, policy, use, target)
    if lock is not None:
        from kernelmux.plan.lock import write_lock

        write_lock(made, lock)
        typer.echo(f"{lock}: locked {made.fingerprint}", err=True)
    if why is not None:
        _show_node(made, why, json)
    elif json:
        print_json(describe(made, made.schedule(rows, rows), rows))
    else:
        _show(made, made.schedule(rows, rows))


def describe(plan: Plan, schedule: Schedule, rows: int) -> dict[str, Any]:
    """The plan at one row count, for a script."""
    return {
        "fingerprint": plan.fingerprint,
        "graph": plan.graph.name,
        "policy": plan.policy.source,
        "device": plan.device.device_class,
        "rows": rows,
        "buckets": plan.buckets,
        "launches": schedule.launches,
        "conversions": schedule.conversions,
        "capture": capturing(plan),
        "bytes": {
            "activations": schedule.layout.nbytes,
            "workspace": schedule.layout.largest_workspace,
            "weights": plan.packed_bytes,
            "second_copies": plan.extra_copy_bytes,
            "kv_per_token": plan.kv_bytes_per_token,
        },
        "nodes": [
            {
                "name": step.node.name,
                "op": step.node.op,
                "kernel": step.choice.name,
                "reason": step.choice.reason,
                "rejected": [_loser(loser) for loser in step.choice.rejected],
            }
            for step in schedule.steps
        ],
    }


def summary(plan: Plan, schedule: Schedule) -> list[str]:
    """A few lines: how many nodes of each op each kernel got, and what the plan needs."""
    from kernelmux.graph.formats import human_bytes
    from kernelmux.plan.plan import kernel_counts

    lines = []
    for op, kernels in kernel_counts(schedule).items():
        total = sum(kernels.values())
        lines.append(f"{op:<15} {', '.join(f'{count}/{total} {name}' for name, count in kernels.items())}")
    copies = f" ({human_bytes(plan.extra_copy_bytes)} of it second copies)" if plan.extra_copy_bytes else ""
    lines += [
        f"{schedule.launches} launches at up to {schedule.m} rows, {schedule.conversions} of them conversions; "
        f"buckets up to {', '.join(str(top) for top in plan.buckets)} rows; fingerprint {plan.fingerprint}",
        f"weights {human_bytes(plan.packed_bytes)}{copies}, activations {human_bytes(schedule.layout.nbytes)} with "
        f"{human_bytes(schedule.layout.largest_workspace)} of workspace, cache {human_bytes(plan.kv_bytes_per_token)} "
        "a token",
    ]
    return lines + capturing(plan)


def capturing(plan: Plan) -> list[str]:
    """On CUDA, which decode steps run as CUDA graphs, and which kernels keep the others from it."""
    from kernelmux.run.capture import CAPTURED_ROWS, captured_rows

    if not plan.device.platform.captures:
        return []
    counts = range(1, min(CAPTURED_ROWS, plan.max_rows) + 1)
    sizes = sorted({size for rows in counts if (size := captured_rows(plan, rows)) is not None})
    lines = [f"decode captured at {', '.join(map(str, sizes))} rows"] if sizes else []
    for top in dict.fromkeys(plan.bucket(rows) for rows in counts):
        if broken := plan.schedule(top, top).not_capturable:
            first, more = broken[0], f" and {len(broken) - 1} more nodes" if len(broken) > 1 else ""
            lines.append(f"eager up to {top} rows: {first.choice.name} of {first.node.name}{more} cannot be captured")
    return lines


def _show(plan: Plan, schedule: Schedule) -> None:
    cells = [
        (
            step.node.name,
            step.node.op,
            step.choice.name,
            step.choice.reason,
            "; ".join(f"{loser.kernel}: {loser.reason}" for loser in step.choice.rejected if loser.kind != "outranked"),
        )
        for step in schedule.steps
    ]
    print_table(("node", "op", "kernel", "reason", "passed over"), cells)
    typer.echo("")
    for line in summary(plan, schedule):
        typer.echo(line)


def _show_node(plan: Plan, name: str, json: bool) -> None:
    """One node's kernel in every bucket, with all candidates."""
    from kernelmux.errors import PlanError, nearest

    buckets = []
    for top in plan.buckets:
        for step in plan.schedule(top, top).steps:
            if name in (step.node.name, *plan.fused.get(step.node.name, ())):
                buckets.append((top, step))
    if not buckets:
        known = {step.node.name for schedule in plan.schedules.values() for step in schedule.steps}
        known.update(part for parts in plan.fused.values() for part in parts)
        raise PlanError(f"no node {name!r}{nearest(name, known).partition(';')[0]}; kernelmux plan lists them")
    if json:
        document = [
            {
                "rows": top,
                "node": step.node.name,
                "kernel": step.choice.name,
                "reason": step.choice.reason,
                "rejected": [_loser(loser) for loser in step.choice.rejected],
            }
            for top, step in buckets
        ]
        print_json({"node": name, "buckets": document})
        return
    for top, step in buckets:
        typer.echo(
            f"up to {top} rows: {step.node.name} ({step.node.op}) runs {step.choice.name}, by {step.choice.reason}"
        )
        for loser in step.choice.rejected:
            typer.echo(f"  not {loser.kernel}: {loser.reason} [{loser.kind}]")


def _plan_of(model: Model, path: Path, use: list[str] | None, device: Device) -> Plan:
    from kernelmux.plan.lock import is_lock

    return model.locked_plan(path, device) if is_lock(path) else make_plan(model, path, use, device)


def _show_diff(before: Plan, after: Plan, json: bool) -> None:
    """Every node whose kernel differs at some row count, with the new reason."""
    moves = []
    for top in sorted({*before.buckets, *after.buckets}):
        ours, theirs = (
            {step.node.name: step.choice for step in p.schedule(min(top, p.max_rows), min(top, p.max_rows)).steps}
            for p in (before, after)
        )
        for name in dict.fromkeys((*ours, *theirs)):
            was, now = ours.get(name), theirs.get(name)
            if (was and was.name) != (now and now.name):
                reason = now.reason if now else "another node takes its place"
                moves.append((top, name, was.name if was else "-", now.name if now else "-", reason))
    if json:
        keys = ("rows", "node", "before", "after", "reason")
        print_json({"moves": [dict(zip(keys, move, strict=True)) for move in moves]})
        return
    if moves:
        print_table(("up to rows", "node", "before", "after", "reason"), moves)
    typer.echo(f"{len(moves)} nodes move; fingerprints {before.fingerprint} and {after.fingerprint}")


def _loser(loser: Rejection) -> dict[str, str]:
    return {"kernel": loser.kernel, "reason": loser.reason, "kind": loser.kind}
