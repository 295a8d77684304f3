"""Architectures on a card: logits in float32 are transformers', and what `auto` takes stays near them, captured."""

from __future__ import annotations

import pytest
import torch

import kernelmux
from checkpoints import CONFIGS, make_checkpoint

pytest.importorskip("transformers", reason="transformers, whose models these are held against, is not installed")

EXACT = '[defaults]\nuse = ["torch:f32", "triton:f32", "reference:f32"]\n[kv]\nformat = "f32"\n'
IDS = torch.randint(3, 96, (24,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request, tmp_path_factory):
    return make_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def truth(checkpoint):
    with torch.no_grad():
        return checkpoint.model(torch.tensor([IDS])).logits[0]


def rows(model, plan):
    """A prompt in two chunks, and the rest token by token."""
    session, ends = model.session(plan, len(IDS)), [5, 14, *range(15, len(IDS) + 1)]
    sequence, starts = session.open(), [0, *ends[:-1]]
    found = [session.feed(sequence, IDS[a:b], all_logits=True).cpu() for a, b in zip(starts, ends, strict=True)]
    return torch.cat(found)


def test_float32_gives_transformers_logits(checkpoint, truth, tmp_path):
    (tmp_path / "exact.toml").write_text(EXACT)
    model = kernelmux.load(checkpoint.folder)
    found = rows(model, model.plan(tmp_path / "exact.toml", device="cuda"))
    assert float((found - truth).abs().max()) < 1e-4


def test_the_default_choice_is_near(checkpoint, truth):
    """In nats a token; the checkpoints are float32."""
    model = kernelmux.load(checkpoint.folder)
    wanted, found = (each.log_softmax(dim=-1) for each in (truth, rows(model, model.plan(device="cuda"))))
    assert float((wanted.exp() * (wanted - found)).sum(dim=-1).mean()) < 1e-3
