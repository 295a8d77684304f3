"""`kernelmux backends`: what is installed, and what is broken."""

from __future__ import annotations

from typing import Annotated

import typer

from kernelmux.cli.common import Json, print_json, print_table


def backends(
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the traceback of a broken backend.")] = False,
    json: Json = False,
) -> None:
    """List the installed backends, the ops that each has kernels for, and why a broken one is quarantined."""
    from kernelmux.contract import registry

    found = registry.current()
    rows = [
        {
            "name": backend.name,
            "version": backend.version,
            "ops": list(found.ops(backend.name)),
            "fault": backend.fault,
            **({"traceback": backend.trace} if verbose and backend.fault else {}),
        }
        for backend in found.backends.values()
    ]
    if json:
        print_json({"backends": rows})
        return
    if not rows:
        typer.echo("no backend is installed: pip install kernelmux-torch (or kernelmux-reference)")
        return
    cells = [
        (row["name"], row["version"], f"quarantined: {row['fault']}" if row["fault"] else " ".join(row["ops"]))
        for row in rows
    ]
    print_table(("backend", "version", "ops"), cells)
    for backend in found.backends.values():
        if verbose and backend.trace:
            typer.echo(f"\n{backend.name}:\n{backend.trace}")
