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


def greedy(model, ids: list[int]) -> list[int]:
    """What transformers' model says next, whatever ends an answer."""
    cache, given, said = None, torch.tensor([ids]), []
    for _ in range(TOKENS):
        with torch.no_grad():
            out = model(given, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        said.append(int(out.logits[0, -1].argmax()))
        given = torch.tensor([said[-1:]])
    return said


def own_greedy(model: kernelmux.Model, ids: list[int]) -> list[int]:
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
        assert own_greedy(ours, ids) == greedy(theirs.eval(), ids), prompt
