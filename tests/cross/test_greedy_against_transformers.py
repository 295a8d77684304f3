"""Real models: the exact plan's greedy tokens are transformers' on the same GGUF file in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kernelmux

transformers = pytest.importorskip("transformers", reason="transformers, which answers too, is not installed")
pytest.importorskip("accelerate", reason="accelerate, by which transformers reads GGUF, is not installed")

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n",
    "🦊 and 🐼 went for a walk 🌲🌲",
    "日本の首都は",
    "Once upon a time, in a village by the sea,",
)
TOKENS = 32


def greedy(model: kernelmux.Model, ids: list[int]) -> list[int]:
    session = model.session(model.plan("exact"), len(ids) + TOKENS)
    sequence, said = session.open(), []
    given = ids
    for _ in range(TOKENS):
        said.append(int(session.feed(sequence, given)[-1].argmax()))
        given = said[-1:]
    return said


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_greedy_tokens_are_transformers(name: str, request: pytest.FixtureRequest):
    path: Path = request.getfixturevalue(name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ours = kernelmux.load(path)
    for prompt in PROMPTS:
        ids = ours.encode(prompt)
        said = greedy(ours, ids)
        # Where it agrees with each token, given those before it, it would have said the same.
        with torch.no_grad():
            logits = theirs.eval()(torch.tensor([[*ids, *said[:-1]]])).logits[0, len(ids) - 1 :]
        assert logits.argmax(dim=-1).tolist() == said, prompt
