"""Makes the tables of times that backends ship: `python tests/bench/measure_times.py --out FOLDER` on the card at hand.

Enters: models, row counts. Leaves: FOLDER/BACKEND/CARD.json, to be put into the backend's `tunings`: what `kernelmux
tune` would ask of this machine. Kernels that the default would not take for their error are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernelmux.contract import registry
from kernelmux.contract.device import find_device
from kernelmux.measure.report import card
from kernelmux.measure.table import Tables
from kernelmux.plan.offers import Offers
from kernelmux.plan.selection import Selector
from kernelmux.policy.policy import default_policy
from kernelmux.run.model import load_random
from kernelmux.tune.questions import Question, find_questions
from kernelmux.tune.worker import Bench, Timed

MODELS = (
    *("llama-8b:Q4_K_M", "llama-8b:bf16", "llama-1b:bf16", "llama-8b:Q8_0", "llama-8b:fp8_row", "smollm2-135m:Q4_1"),
)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
CONTEXT = 512

Found = dict[str, dict[str, dict[str, dict[str, float]]]]
"""Microseconds by package, family, size and rows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    device = find_device(asked.device)
    bench, found = Bench(device), Found()
    for name in asked.models:
        model, policy = load_random(name), default_policy()
        graph = model.graph.with_cache_format(policy.cache_format(device))
        selector = Selector(policy, Offers(registry.current(), device))
        for question in find_questions(graph, selector, asked.rows, Tables(device), CONTEXT):
            answer(question, bench, found)
        # Kept after every model: what an interrupted run has found is of use too.
        for package, times in found.items():
            path = asked.out / package.removeprefix("kernelmux_") / f"{card(device)}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(written_table(device.name, device.arch, times), "utf-8")
        print(name, flush=True)


def answer(question: Question, bench: Bench, found: Found) -> None:
    """Times a kernel unless an earlier model asked the same; what fails is told and left out."""
    sizes = found.setdefault(question.package, {}).setdefault(question.family, {})
    rows = sizes.setdefault(question.size, {})
    if str(question.work.m) in rows:
        return
    try:
        timing, _, _ = Timed(question.work, question.kernel, variants=False).run(bench, lambda stage: None)
    except Exception as error:
        print(f"{question.subject}, {question.work.label}, m = {question.work.m}: {error}", flush=True)
    else:
        rows[str(question.work.m)] = round(timing.median, 2)


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
