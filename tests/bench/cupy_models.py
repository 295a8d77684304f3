"""Whole models decoded by CuPy alone, beside torch in bfloat16; writes CARD-dp4a-models.json.

    python tests/bench/cupy_models.py --out docs/results --model SmolLM2-135M-Instruct.Q4_1.gguf

Each model once with every op on CuPy and its weights as they are stored, once in bfloat16 with torch's kernels.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from result import Result, arguments, release

from kernelmux.contract.device import Device, find_device
from kernelmux.measure.ceilings import measure_ceilings
from kernelmux.run.bench import Load, ModelTiming, time_model
from kernelmux.run.model import Model, load, load_random

POLICIES = Path(__file__).parents[2] / "examples" / "policies"
ROWS = 16
"""Rows that every CuPy kernel takes; the prompt is read in chunks of so many."""
LOAD = Load(prompt=64, context=512, batch=1, decode=128)


def measure(result: Result, label: str, model: Model, policy: str, rows: int) -> None:
    timed = result.attempt(f"{label}, {policy}", partial(time_decoding, model, policy, rows, result.device))
    if timed is not None:
        result.rows.append(row(label, policy, timed))


def time_decoding(model: Model, policy: str, rows: int, device: Device) -> ModelTiming:
    plan = model.plan(POLICIES / f"{policy}.toml", device=device.torch, max_rows=rows)
    return time_model(model, plan, LOAD)


def row(label: str, policy: str, timed: ModelTiming) -> dict[str, Any]:
    decode = timed.decode
    return {
        "model": label,
        "policy": policy,
        "work": f"decode, batch {LOAD.batch}, context {LOAD.context}",
        "tokens/s": round(timed.decode_rate, 1),
        "p10 to p90": [round(LOAD.batch / us * 1e6, 1) for us in (decode.p90, decode.p10)],
        "us a step": round(decode.median, 1),
        "launches": timed.launches,
        "Python us a step": round(timed.host.median, 1) if timed.host else "",
        "weights GB": round(timed.memory["weights"] / 1e9, 2),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, help="a GGUF file, timed as well")
    asked = parser.parse_args()
    device = find_device("cuda")
    title = "Models decoded by CuPy alone, beside torch in bf16"
    result = Result("dp4a-models", title, device, measure_ceilings(device))
    result.method = f"medians of rounds of {LOAD.decode} captured steps"
    made = [(name, partial(load_random, name, device.torch)) for name in ("llama-8b:Q4_K_M", "llama-8b:bf16")]
    made += [(asked.model.stem, partial(load, asked.model))] if asked.model else []
    for label, make in made:
        for policy, rows in (("cuda-cupy", ROWS), ("cuda-bf16", 64)):
            # A quantised model of this size is compared with the same shape in bfloat16.
            if label.startswith("llama") and (policy == "cuda-bf16") != label.endswith("bf16"):
                continue
            measure(result, label, make(), policy, rows)
            release()
    result.write(asked.out, asked.commit)


if __name__ == "__main__":
    main()
