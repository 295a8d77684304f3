"""Architectures on a card: logits in float32 are transformers', and what `auto` takes stays near them, captured."""

from __future__ import annotations

import pytest

import kernelmux
from checkpoints import CONFIGS, divergence, in_parts, make_checkpoint, truth_of

pytest.importorskip("transformers", reason="transformers, whose models these are held against, is not installed")

EXACT = '[defaults]\nuse = ["torch:f32", "triton:f32", "reference:f32"]\n[kv]\nformat = "f32"\n'


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request, tmp_path_factory):
    return make_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def truth(checkpoint):
    return truth_of(checkpoint)


def test_float32_gives_transformers_logits(checkpoint, truth, tmp_path):
    (tmp_path / "exact.toml").write_text(EXACT)
    model = kernelmux.load(checkpoint.folder)
    found = in_parts(model, model.plan(tmp_path / "exact.toml", device="cuda"))
    assert float((found - truth).abs().max()) < 1e-4


def test_the_default_choice_is_near(checkpoint, truth):
    """In nats a token; the checkpoints are float32."""
    model = kernelmux.load(checkpoint.folder)
    assert divergence(in_parts(model, model.plan(device="cuda")), truth) < 1e-3
