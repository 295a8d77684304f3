"""`kernelmux backends`: what is installed, which kernels it has, what they take, and what is broken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelmux.cli.common import Json
from kernelmux.cli.output import print_json, print_table, say, tell

if TYPE_CHECKING:
    from kernelmux.contract.kernel import Kernel
    from kernelmux.contract.registry import Backend, Registry


def backends(
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Also each kernel and what it takes, and a broken backend's traceback.")
    ] = False,
    json: Json = False,
) -> None:
    """List the installed backends, the ops that each has kernels for, and why a broken one is quarantined."""
    from kernelmux.contract import registry

    found = registry.current()
    # Asked for their kernels first: a backend may show only then that it is broken.
    ops = {name: list(found.ops(name)) for name in list(found.backends)}
    rows = [_row(backend, ops[backend.name], found, verbose) for backend in found.backends.values()]
    if json:
        print_json({"backends": rows})
        return
    if not rows:
        tell("no backend is installed: pip install kernelmux-torch (or kernelmux-reference)")
        return
    cells = [
        (row["name"], row["version"], f"quarantined: {row['fault']}" if row["fault"] else " ".join(row["ops"]))
        for row in rows
    ]
    print_table(("backend", "version", "ops"), cells)
    if verbose:
        for row in rows:
            _show_details(row)


def _row(backend: Backend, ops: list[str], found: Registry, verbose: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"name": backend.name, "version": backend.version, "ops": ops, "fault": backend.fault}
    if verbose:
        row["kernels"] = [_kernel(kernel) for kernel in found.classes(backend.name)]
        if backend.fault:
            row["traceback"] = backend.trace
    return row


def _kernel(kernel: type[Kernel]) -> dict[str, Any]:
    """What a kernel class declares."""
    from kernelmux.graph.domain import in_words

    return {
        "name": kernel.name,
        "ops": list(kernel.ops),
        "devices": list(kernel.devices),
        "capability": ".".join(map(str, kernel.capability)) if any(kernel.capability) else "",
        "takes": {name: in_words(allowed) for name, allowed in kernel.takes.items()},
        "precision": kernel.precision,
        "launches": kernel().launches,
        "capturable": kernel.capturable,
        "about": (kernel.__doc__ or "").strip().partition("\n")[0],
    }


def _show_details(row: dict[str, Any]) -> None:
    if row["kernels"]:
        tell(f"\n{row['name']}:")
    for kernel in row["kernels"]:
        limits = [f"{name} {allowed}" for name, allowed in kernel["takes"].items()]
        limits += [f"on {' or '.join(kernel['devices'])}"] if kernel["devices"] else []
        limits += [f"capability {kernel['capability']} or above"] if kernel["capability"] else []
        takes = f"; {', '.join(limits)}" if limits else ""
        ops = "every op" if kernel["ops"] == ["*"] else " ".join(kernel["ops"])
        say(f"  {row['name']}:{kernel['name']} of {ops}: NMSE up to {kernel['precision']:g}{takes}", indent="    ")
    if "traceback" in row:
        tell(f"\n{row['name']}:\n{row['traceback']}")
