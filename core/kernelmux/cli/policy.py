"""`kernelmux policy`: check a policy file, or show its schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kernelmux.cli.command import Command
from kernelmux.cli.common import (
    DeviceAs,
    DeviceNameOrAs,
    Json,
    asked_device,
)
from kernelmux.cli.output import print_json, say, tell

policy = typer.Typer(help="Check a policy file, or print the JSON Schema that editors use.", no_args_is_help=True)


@policy.command(cls=Command)
def check(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A policy file (TOML), or `default`.", show_default=False)
    ],
    model: Annotated[
        Path | None, typer.Option("--model", metavar="MODEL", help="Also check it against this model.")
    ] = None,
    device: DeviceNameOrAs = None,
    device_as: DeviceAs = None,
    json: Json = False,
) -> None:
    """Find names of nothing, rules never reached, rules that match nothing, and requirements that fail.

    Exit code 0: nothing found; 1: findings; 2: a file cannot be read, or there is no such device.
    """
    from kernelmux.contract import registry
    from kernelmux.errors import PolicyError
    from kernelmux.models import open_model
    from kernelmux.plan.check import check_policy
    from kernelmux.plan.names import Finding
    from kernelmux.policy.policy import Policy, check_text, policy_text

    target, graph = asked_device(device, device_as), open_model(model).graph if model else None
    try:
        parsed = check_text(policy_text(file), str(file))
    except PolicyError as error:
        if error.line is None:
            raise
        parsed = [error]
    if isinstance(parsed, Policy):
        found = check_policy(parsed, registry.current(), target, graph)
    else:
        found = [Finding.of(error) for error in parsed]
    if json:
        print_json({"file": str(file), "findings": [{"line": f.line, "message": f.message} for f in found]})
    else:
        for finding in found:
            say(f"{file}:{finding.line}: {finding.message}")
        if not found:
            tell(f"{file}: no findings")
    if found:
        raise typer.Exit(1)


@policy.command(cls=Command)
def schema() -> None:
    """Print the JSON Schema of policy files."""
    from kernelmux.policy.grammar import Document

    print_json(Document.model_json_schema())
