"""What the default says beside float32 on this processor: answers, greedy tokens, divergences. Run, it prints JSON.

What limits a processor acts only where it is set before torch is imported: then a process of its own asks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import kernelmux
from kernelmux.plan.plan import Plan
from kernelmux.policy.policy import EXACT
from kernelmux.run.divergence import divergence, prose
from kernelmux.run.model import Model

GOLDENS = json.loads((Path(__file__).parent / "data" / "smollm2_greedy.json").read_text("utf-8"))["cases"]
QUESTIONS = ("What is the capital of France?",)
"""What README.md and docs/ ask through the chat template."""
MOST_TOKENS = 48


def figures(model: Model, tokens: int, decoded: int, cases: Sequence[Any] = GOLDENS) -> dict[str, Any]:
    """The default's figures, over so many tokens of prose read as prompts are, and as decoding is."""
    default, exact = model.plan(), model.plan(EXACT)
    # As long as they are held, weights are packed once.
    held = [model.session(plan, 1) for plan in (default, exact)]
    for session in held:
        list(session.prepare(()))
    ids = model.encode(prose())[:tokens]
    found = {
        "device": default.device.device_class,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "answers": {question: [answer(model, question, plan) for plan in (default, exact)] for question in QUESTIONS},
        "prompts": divergence(model, default, exact, ids),
        "decoding": divergence(model, default, exact, ids[:decoded], 1),
        "continuations": [continuation(model, default, exact, golden) for golden in cases],
        "stored": {"exact": exact.graph.values["blk.0.k_cache"].format, "logits": logit_formats(default)},
        "kernels": {rows: kernels(default, rows) for rows in (1, 8, 512)},
    }
    del held
    return found


def answer(model: Model, question: str, plan: Plan) -> str:
    return "".join(model.generate([{"role": "user", "content": question}], plan, max_tokens=MOST_TOKENS))


def continuation(model: Model, default: Plan, exact: Plan, golden: Mapping[str, Any]) -> dict[str, Any]:
    """How many tokens are as recorded, by each plan; and where one is not, float32's two best logits there."""
    wanted, prompt = golden["greedy"][:MOST_TOKENS], golden["ids"]
    by_default, by_exact = (agreement(model, plan, exact, prompt, wanted) for plan in (default, exact))
    return {"tokens": len(wanted), "default": by_default, "exact": by_exact}


def agreement(model: Model, plan: Plan, exact: Plan, prompt: Sequence[int], wanted: Sequence[int]) -> dict[str, Any]:
    generation = model.generate(prompt, plan, max_tokens=len(wanted))
    list(generation)
    pairs = zip(generation.ids, wanted, strict=False)
    same = next((place for place, (found, token) in enumerate(pairs) if found != token), None)
    if same is None:
        return {"same": min(len(generation.ids), len(wanted)), "gap": 0.0}
    # On float32's tokens, whatever the plan said before.
    best = model.forward([*prompt, *wanted[:same]], exact)[-1].topk(2).values
    return {"same": same, "gap": float(best[0] - best[1])}


def logit_formats(plan: Plan) -> list[str]:
    """In what the product that makes the logits writes them, at any rows."""
    heads = [step.node for step in plan.steps if step.node.outputs[0].name == "logits"]
    return sorted({node.outputs[0].format for node in heads})


def kernels(plan: Plan, rows: int) -> list[str]:
    """Who multiplies at so many rows."""
    return sorted({step.choice.name for step in plan.schedule(rows, rows).steps if step.node.op.startswith("mul_mat")})


if __name__ == "__main__":
    path, tokens, decoded = sys.argv[1:]
    print(json.dumps(figures(kernelmux.load(path), int(tokens), int(decoded))))
