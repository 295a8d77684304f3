"""`kernelmux plan`: which kernel each node gets, and why; two plans compared; a plan locked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kernelmux.cli.common import (
    Context,
    DeviceAs,
    DeviceNameOrAs,
    Exact,
    Json,
    MaxRows,
    OptionalModelPath,
    PolicyPath,
    RandomModel,
    Strict,
    Use,
    asked_device,
    asked_policy,
    make_plan,
    noted,
    open_asked,
    refuse_overwriting,
    refuse_together,
    traced,
)
from kernelmux.cli.output import line_width, print_json, tell

if TYPE_CHECKING:
    from kernelmux.contract.device import Device
    from kernelmux.plan.plan import Plan
    from kernelmux.run.model import Model


@traced
def plan(
    model: OptionalModelPath = None,
    random: RandomModel = None,
    policy: PolicyPath = None,
    exact: Exact = False,
    use: Use = None,
    strict: Strict = False,
    device: DeviceNameOrAs = None,
    device_as: DeviceAs = None,
    max_rows: MaxRows = None,
    context: Context = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=1, help="Only the choices for so many rows: 1 is decode, which JSON shows."),
    ] = None,
    why: Annotated[
        str | None, typer.Option("--why", metavar="NODE", help="All about one node, or a row of the table.")
    ] = None,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--diff",
            metavar="A B",
            help="Which nodes move between two policies (`default` and `exact` are two) or lock files, and why.",
        ),
    ] = None,
    lock: Annotated[Path | None, typer.Option("--lock", metavar="FILE", help="Write the plan to a lock file.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Also every refusal, names in full, tracebacks.")] = False,
    json: Json = False,
) -> None:
    """Show the kernel of every node and the reason, alike layers as one row."""
    from dataclasses import asdict

    from kernelmux.plan import explain
    from kernelmux.plan.diff import moves, show_diff
    from kernelmux.plan.lock import is_lock
    from kernelmux.plan.why import why_data

    refuse_together(
        "--diff" if diff else "", policy=policy, exact=exact, why=why, rows=rows, lock=lock, verbose=verbose
    )
    refuse_overwriting("--lock", lock, model=model, policy=policy)
    opened, target = open_asked(model, random, context=context), asked_device(device, device_as)
    if diff is not None:
        files = [(path, _piped(path)) for path in diff]
        locks = all(is_lock(*file) for file in files)
        refuse_together("--diff of two lock files" if locks else "", use=use, max_rows=max_rows)
        before, after = (_plan_of(opened, *file, use, target, strict, max_rows) for file in files)
        if json:
            print_json({"moves": [asdict(move) for move in moves(before, after)]})
        else:
            tell(show_diff(before, after, line_width()))
        return
    made = make_plan(opened, asked_policy(policy, exact), use, target, strict, max_rows)
    if lock is not None:
        from kernelmux.plan.lock import write_lock

        write_lock(made, lock)
        typer.echo(f"{lock}: locked {made.fingerprint}", err=True)
    if rows is not None and rows > made.max_rows:
        message = f"the plan takes up to {made.max_rows} rows, not {rows}: longer prompts run in several steps"
        raise typer.BadParameter(message, param_hint="--rows")
    if why is not None and json:
        print_json(why_data(made, why, rows))
    elif why is not None:
        tell(made.why(why, rows))
    elif json:
        print_json({**explain.describe(made, rows or 1), "capture": capturing(made)})
    else:
        for line in (explain.show(made, rows, line_width(), verbose), *capturing(made)):
            tell(line)


def capturing(plan: Plan) -> list[str]:
    """Where the device captures graphs: which decode steps run as one, and which kernels keep the others from it."""
    from kernelmux.measure.steps import CAPTURED_ROWS
    from kernelmux.run.capture import captured_rows

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


def _piped(path: Path) -> bytes | None:
    """What a pipe holds, which can be read once; None for other files, and for what is none."""
    return path.read_bytes() if path.is_fifo() else None


def _plan_of(
    model: Model,
    path: Path,
    written: bytes | None,
    use: list[str] | None,
    device: Device,
    strict: bool,
    max_rows: int | None,
) -> Plan:
    from kernelmux.plan.lock import is_lock
    from kernelmux.policy.policy import read_policy

    if is_lock(path, written):
        return noted(model.locked_plan(path, device, written=written), strict)
    return make_plan(model, read_policy(path, written), use, device, strict, max_rows)
