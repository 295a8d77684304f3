"""How long it is from the command to the first token, and where that goes: CARD-loading.json.

    python tests/bench/loading.py --device cuda --file llama-8b:Q4_K_M=/tmp/8b.gguf --random llama-1b:bf16

Each model starts in processes of its own: once with empty caches of compiled kernels, then some times with full ones;
the file is in the page cache, and Python has its bytecode. tests/bench/random_file.py writes files of random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kernelmux.contract.device import Device, find_device
from kernelmux.measure.report import card, make_report, save_report
from kernelmux.plan.plan import Plan
from kernelmux.run.model import Model, load

WARM = 5
"""Starts with full caches: the median of them counts."""
PROMPT = 32
FIRST, PACKING = "first token", "packing weights"


def starts(model: Sequence[str], device: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The answers of `kernelmux run --json`, the first one's caches empty."""
    caches = {"KERNELMUX_CACHE": str(folder / "kernelmux"), "TRITON_CACHE_DIR": str(folder / "triton")}
    command = [sys.executable, "-m", "kernelmux", "run", *model, "--device", device, "-p", "a" * PROMPT]
    for _ in range(WARM + 1):
        began = time.perf_counter()
        ran = subprocess.run(
            [*command, "--max-tokens", "3", "--json"], capture_output=True, text=True, env={**os.environ, **caches}
        )
        took = time.perf_counter() - began
        if ran.returncode:
            raise RuntimeError(ran.stderr[-2000:])
        yield {**json.loads(ran.stdout), "whole command": took}


def rows(name: str, answers: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Cold, and the median of the warm ones: seconds to the first token, and of each stage."""
    for label, part in (("cold", answers[:1]), ("warm", answers[1:])):
        told = [each["timing"] for each in part]
        middle = sorted(told, key=lambda timing: timing[FIRST])[len(told) // 2]
        low, high = min(each[FIRST] for each in told), max(each[FIRST] for each in told)
        yield {
            "model": name,
            "kernels' caches": label,
            "first token, s": round(middle[FIRST], 2),
            "least and most, s": [round(low, 2), round(high, 2)],
            **{f"{stage}, s": round(seconds, 2) for stage, seconds in middle.items() if stage != FIRST},
        }


def packing_alone(model: Model, plan: Plan) -> tuple[float, int]:
    """Seconds to upload and pack in a process that has done so before, and the most bytes beside the packed forms."""
    seconds, beside = [], 0
    for _ in range(3):
        session = model.session(plan, 64)
        _wait(plan.device)
        before = plan.device.platform.peak_bytes(plan.device)
        began = time.perf_counter()
        for _ in session.prepare(()):
            pass
        _wait(plan.device)
        seconds.append(time.perf_counter() - began)
        beside = (plan.device.platform.peak_bytes(plan.device) or 0) - plan.packed_bytes if before is not None else 0
        del session
    return statistics.median(seconds), beside


def _wait(device: Device) -> None:
    device.platform.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--file", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--random", action="append", default=[], metavar="SHAPE:FORMAT")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--commit", default="", help="where the tree is no checkout")
    asked = parser.parse_args()
    device = find_device(asked.device)
    models = [(name, [path]) for name, _, path in (each.partition("=") for each in asked.file)]
    models += [(name, ["--random", name]) for name in asked.random]
    found: list[dict[str, Any]] = []
    notes = [f"A prompt of {PROMPT} tokens, the default policy; warm is the median of {WARM} starts."]
    for name, arguments in models:
        with tempfile.TemporaryDirectory() as folder:
            answers = list(starts(arguments, asked.device, Path(folder)))
        found += rows(name, answers)
        print(*found[-2:], sep="\n", flush=True)
    for name, path in (each.split("=", 1) for each in asked.file):
        model = load(path)
        plan = model.plan(device=device)
        seconds, beside = packing_alone(model, plan)
        size = Path(path).stat().st_size
        notes.append(
            f"{name}: {size / 1e9:.2f} GB are uploaded and packed to {plan.packed_bytes / 1e9:.2f} GB in "
            f"{seconds:.2f} s, {size / 1e9 / seconds:.1f} GB/s of the file; at most {beside / 1e6:.0f} MB lay beside "
            "the packed forms."
        )
        print(notes[-1], flush=True)
        del model, plan
    method = "Seconds since the process began, as `kernelmux run --json` tells; page cache warm"
    report = make_report(
        f"From the command to the first token, {device.name}", device, method, found, notes, asked.commit
    )
    asked.out.mkdir(parents=True, exist_ok=True)
    name = "cpu" if device.platform.host_memory else card(device)
    save_report(report, asked.out / f"{name}-loading.json")


if __name__ == "__main__":
    main()
