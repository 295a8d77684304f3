"""`kernelmux policy`: check a policy file, or show its schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kernelmux.cli.common import DeviceAs, DeviceName, Json, asked_device, print_json

policy = typer.Typer(help="Check a policy file, or print the JSON Schema that editors use.", no_args_is_help=True)


@policy.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A policy file (TOML).", show_default=False)],
    model: Annotated[
        Path | None, typer.Option("--model", metavar="MODEL", help="Also check it against this GGUF file.")
    ] = None,
    device: DeviceName = "cpu",
    device_as: DeviceAs = None,
    json: Json = False,
) -> None:
    """Find names of nothing, rules never reached, rules that match nothing, and requirements that fail: exit code 1."""
    from kernelmux.contract import registry
    from kernelmux.errors import PolicyError
    from kernelmux.plan.check import Finding, check_policy
    from kernelmux.policy.policy import read_policy

    try:
        parsed = read_policy(file)
        graph = None
        if model is not None:
            from kernelmux.models import open_model

            graph = open_model(model).graph
        found = check_policy(parsed, registry.current(), asked_device(device, device_as), graph)
    except PolicyError as error:
        if not file.is_file():
            raise
        found = [Finding.of(error)]
    if json:
        print_json({"file": str(file), "findings": [{"line": f.line, "message": f.message} for f in found]})
    else:
        for finding in found:
            typer.echo(f"{file}:{finding.line}: {finding.message}")
        if not found:
            typer.echo(f"{file}: no findings")
    if found:
        raise typer.Exit(1)


@policy.command()
def schema() -> None:
    """Print the JSON Schema of policy files."""
    from kernelmux.policy.grammar import Document

    print_json(Document.model_json_schema())
