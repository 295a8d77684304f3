"""Makes the tables of times that backends ship: `python tests/bench/measure_times.py --out FOLDER` on the card at hand.

Enters: models, row counts. Leaves: FOLDER/BACKEND/CARD.json, to be put into the backend's `tunings`. Kernels that the
default would not take for their error are left out, and so are the reference's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernelmux.contract import registry
from kernelmux.contract.device import find_device
from kernelmux.contract.kernel import Kernel
from kernelmux.graph.ops import fused_ops
from kernelmux.measure.report import card
from kernelmux.measure.tune import Found, time_works
from kernelmux.measure.works import Work, model_works
from kernelmux.plan.budget import added_error, default_budget
from kernelmux.run.model import load_random

MODELS = ("llama-8b:bf16", "llama-1b:bf16", "llama-8b:Q4_K_M", "smollm2-135m:Q4_1", "llama-8b:Q8_0")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
CONTEXT = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    device = find_device(asked.device)
    found: Found = {}
    for model in asked.models:
        graph = load_random(model).graph.with_cache_format(device.platform.activations)
        ops = dict.fromkeys([*(node.op for node in graph.ops), *(op.name for op in fused_ops()), "convert"])
        works = [work for rows in asked.rows for work in model_works(graph, ops, rows, CONTEXT)]
        time_works(works, registry.current(), device, found, wanted)
        print(model, flush=True)
    for package, times in found.items():
        path = asked.out / package.removeprefix("kernelmux_") / f"{card(device)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(written_table(device.name, device.arch, times), "utf-8")
        print(path)


def wanted(name: str, kernel: Kernel, work: Work) -> bool:
    """Whether the default might take it."""
    return not name.startswith("reference:") and added_error(kernel, work.node) <= default_budget(work.node)


def written_table(name: str, arch: str, times: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The table as JSON, a line a size."""
    families = []
    for family, sizes in sorted(times.items()):
        lines = (f"   {json.dumps(size)}: {json.dumps(_by_rows(rows))}" for size, rows in sorted(sizes.items()))
        families.append(f"  {json.dumps(family)}: {{\n" + ",\n".join(lines) + "\n  }")
    head = f' "cards": [{json.dumps(name)}],\n "arch": {json.dumps(arch)},\n "choices": {{}},\n "times": {{\n'
    return "{\n" + head + ",\n".join(families) + "\n }\n}\n"


def _by_rows(rows: Mapping[str, float]) -> dict[str, Any]:
    return {count: rows[count] for count in sorted(rows, key=int)}


if __name__ == "__main__":
    main()
