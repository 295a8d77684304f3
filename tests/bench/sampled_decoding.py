"""Decoding that draws its tokens beside decoding that takes the likeliest, in one process: CARD-sampling.json.

    python tests/bench/sampled_decoding.py --device cuda MODEL.gguf

Each setting is timed as `kernelmux bench model` does, greedy decoding before and after all others.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kernelmux.contract.device import find_device
from kernelmux.graph.formats import human_count
from kernelmux.measure.report import card, make_report, save_report
from kernelmux.run.bench import DECODES, Load, time_model
from kernelmux.run.model import load
from kernelmux.run.sampling import Sampling

SETTINGS = {
    "greedy": Sampling(),
    "temperature 0.8, top_p 0.9": Sampling(temperature=0.8, top_p=0.9),
    "temperature 0.8": Sampling(temperature=0.8),
    "temperature 0.8, top_p 0.9, repetition_penalty 1.1": Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.1),
    "temperature 0.8, min_p 0.05": Sampling(temperature=0.8, min_p=0.05),
    "temperature 0.8, top_k 50, top_p 0.9": Sampling(temperature=0.8, top_k=50, top_p=0.9),
    "greedy again": Sampling(),
}
STEPS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="", help="what the model is called in the table")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--commit", default="", help="where the tree is no checkout")
    asked = parser.parse_args()
    device = find_device(asked.device)
    model = load(asked.model)
    plan = model.plan(device=device)
    held = model.session(plan, 1)
    for _ in held.prepare(()):
        pass
    rows: list[dict[str, Any]] = []
    for name, sampling in SETTINGS.items():
        timed = time_model(model, plan, Load(64, 512, asked.batch, STEPS, sampling))
        greedy = rows[0]["tokens/s"] if rows else timed.decode_rate
        rows.append({"drawn by": name, "tokens/s": timed.decode_rate, "of greedy": timed.decode_rate / greedy})
        print(rows[-1], flush=True)
    told = [{**row, "tokens/s": round(row["tokens/s"], 1), "of greedy": round(row["of greedy"], 3)} for row in rows]
    title = f"Decoding that draws, {asked.name or model.graph.name}, {device.name}"
    method = f"Medians of {DECODES} times {STEPS} steps of {human_count(asked.batch, 'sequence')} at 512 cached tokens"
    report = make_report(title, device, method, told, commit=asked.commit)
    asked.out.mkdir(parents=True, exist_ok=True)
    save_report(report, asked.out / f"{'cpu' if device.platform.host_memory else card(device)}-sampling.json")


if __name__ == "__main__":
    main()
