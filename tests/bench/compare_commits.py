"""Times whole models with two commits of kernelmux, in turns on one card: what a change of the contract costs.

Enters: two folders that the commits' distributions are installed in (`pip install --target`). Leaves: a row for each
model, with the medians of both and their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from kernelmux.contract.device import find_device
from kernelmux.measure.report import make_report, save_report

WORKS = {
    "llama-8b:bf16, default": ["--random", "llama-8b:bf16"],
    "llama-8b:Q4_K_M, cuda-cupy": [
        *("--random", "llama-8b:Q4_K_M", "--policy", "{policies}/cuda-cupy.toml"),
        *("--max-rows", "16", "--prompt", "64"),
    ],
}
TURNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="the folder of the earlier commit")
    parser.add_argument("--after", type=Path, required=True)
    parser.add_argument("--policies", type=Path, required=True, help="policy files that both can read")
    parser.add_argument("--names", nargs=2, default=("before", "after"), metavar="COMMIT")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    rows = []
    for work, options in WORKS.items():
        filled = [option.format(policies=asked.policies.resolve()) for option in options]
        timed: dict[str, list[dict[str, float]]] = {name: [] for name in asked.names}
        for _ in range(TURNS):
            for name, folder in zip(asked.names, (asked.before, asked.after), strict=True):
                timed[name].append(_time(folder, filled))
                print(work, name, timed[name][-1], flush=True)
        for figure in timed[asked.names[0]][0]:
            before, after = (sorted(turn[figure] for turn in timed[name])[TURNS // 2] for name in asked.names)
            rows.append(
                {"model": work, "figure": figure, asked.names[0]: before, asked.names[1]: after}
                | {"ratio": round(after / before, 4) if before else ""}
            )
    device = find_device("cuda")
    method = f"`kernelmux bench model` of both, in turns, {TURNS} processes each; the median of their medians"
    title = f"{asked.names[0]} and {asked.names[1]} on {device.name}"
    save_report(make_report(title, device, method, rows, commit=asked.names[1]), asked.out)


def _time(folder: Path, options: list[str]) -> dict[str, float]:
    """What one process measures: medians by work, and launches of a decoded step."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "kernelmux", "bench", "model", *options, "--device", "cuda"]
        # Safe path: nothing of the folder that this runs in.
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
        subprocess.run([*command, "--save", str(report)], check=True, env=env, cwd=scratch, stdout=subprocess.DEVNULL)
        found = {}
        for row in json.loads(report.read_text("utf-8"))["rows"]:
            found[f"{row['work']}, {row['unit']}"] = row["median"]
            if row["launches"]:
                found["launches of a step"] = row["launches"]
        return found


if __name__ == "__main__":
    main()
