"""A result as docs/performance.py reads it: rows, and everything that is needed to measure them again."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kernelmux.contract import registry
from kernelmux.contract.cache import library_versions
from kernelmux.contract.device import Device
from kernelmux.files import write_whole


def make_report(
    title: str,
    device: Device,
    method: str,
    rows: Sequence[Mapping[str, Any]],
    notes: Iterable[str] = (),
    commit: str = "",
) -> dict[str, Any]:
    """The document: title, machine, versions, commit (the checkout's, if none is told), date, method, rows, notes."""
    # What may move a figure; transformers is a peer of some.
    libraries = (library for backend in registry.current().backends.values() for library in backend.libraries)
    versions = library_versions(dict.fromkeys(("kernelmux", "torch", *libraries, "transformers")))
    return {
        "title": title,
        "machine": machine(device),
        "versions": {"python": platform.python_version(), **versions},
        "commit": commit or _commit(),
        "date": datetime.date.today().isoformat(),
        "method": method,
        "rows": list(rows),
        "notes": list(notes),
    }


def save_report(report: Mapping[str, Any], path: Path) -> None:
    """Writes the document as JSON."""
    write_whole(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def machine(device: Device) -> str:
    """The card, or the processor with its threads."""
    if not device.platform.host_memory:
        return device.name
    import torch

    return f"{processor()}, {torch.get_num_threads()} threads"


def card(device: Device) -> str:
    """What a result file is called by: `h100` of NVIDIA H100 80GB HBM3."""
    return device.name.removeprefix("NVIDIA ").partition(" ")[0].lower()


def processor() -> str:
    """The processor's name and the extensions that matter here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in fields.items()}
    flags = [f for f in ("avx512_vnni", "avx512_bf16", "amx_bf16") if f in facts.get("flags", "").split()]
    name = facts.get("model name", platform.processor())
    return f"{name} ({', '.join(flags)})" if flags else name


def _commit() -> str:
    """The commit of the source tree; `unknown` where this is no checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        ran = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return ran.stdout.strip()
