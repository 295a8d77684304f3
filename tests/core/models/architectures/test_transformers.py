"""Every architecture gives transformers' logits, from folders and from GGUF, in one step and token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kernelmux
import kernelmux.errors
from checkpoints import (
    CONFIGS,
    IDS,
    LONGROPE,
    WINDOW,
    divergence,
    in_parts,
    make_checkpoint,
    truth_of,
    write_gguf_of,
)
from kernelmux.models.architectures import ARCHITECTURES
from kernelmux.models.gguf import read
from tiny_model import write_gguf

pytest.importorskip("transformers", reason="transformers, whose models these are held against, is not installed")

EXACT = ("*=reference:f32",)
MOST = 1e-4


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request, tmp_path_factory):
    return make_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(checkpoint):
    return kernelmux.load(checkpoint.folder)


@pytest.fixture(scope="module")
def truth(checkpoint):
    return truth_of(checkpoint)


def off(found, truth):
    return float((found - truth).abs().max())


def test_a_prompt_in_one_step(model, truth):
    assert off(model.forward(IDS, model.plan(use=EXACT)), truth) < MOST


def test_chunks_and_then_tokens_beyond_the_window(model, truth):
    assert len(IDS) // 3 > WINDOW
    assert off(in_parts(model, model.plan(use=EXACT)), truth) < MOST


def test_the_same_from_gguf(checkpoint, model, truth, tmp_path):
    opened = kernelmux.load(write_gguf_of(checkpoint.folder, model.source.shape, tmp_path / "same.gguf"))
    assert replace(opened.source.shape, epsilon=model.source.shape.epsilon) == model.source.shape
    assert off(opened.forward(IDS, opened.plan(use=EXACT)), truth) < MOST


def check_default(model, truth):
    """In nats a token; of kernels that take 8-bit activations it would be some 1e-3."""
    found = model.forward(IDS, model.plan())
    assert divergence(found, truth) < 1e-6
    assert found.argmax(dim=-1).equal(truth.argmax(dim=-1))


def test_the_default_choice_of_torch_is_near(without_numba, model, truth):
    check_default(model, truth)


@pytest.mark.slow
def test_the_default_choice_is_near(model, truth):
    check_default(model, truth)


def test_every_architecture_is_among_them(tmp_path):
    for architecture in ARCHITECTURES:
        assert any(f"{name}-".startswith(f"{architecture}-") for name in CONFIGS), architecture


def test_a_longer_context_has_divisors_of_its_own(tmp_path):
    """transformers takes them from a length on, for all positions."""
    made = make_checkpoint("phi3-longrope", tmp_path)
    short, long = kernelmux.load(tmp_path), kernelmux.load(tmp_path, context=40)
    assert (short.source.shape.context, long.source.shape.context) == (LONGROPE["original_max_position_embeddings"], 64)
    ids = [*IDS, *IDS][:40]
    with torch.no_grad():
        truth = made.model(torch.tensor([ids])).logits[0]
    assert off(long.forward(ids, long.plan(use=EXACT)), truth) < MOST
    with pytest.raises(kernelmux.errors.ModelError, match="a context of 65 tokens was asked for, the model holds 64"):
        kernelmux.load(tmp_path, context=65)


def without(folder, tmp_path, *keys):
    """The folder as a GGUF file that does not state these."""
    source = kernelmux.load(folder).source
    left_out = {f"{source.file.metadata['general.architecture']}.{key}": None for key in keys}
    return write_gguf_of(folder, source.shape, tmp_path / "without.gguf", left_out)


def test_first_files_of_gemma2_have_the_window_and_the_caps_of_all(tmp_path):
    made = make_checkpoint("gemma2", tmp_path / "folder")
    keys = ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
    nodes = kernelmux.load(without(made.folder, tmp_path, *keys, "attention.sliding_window_pattern")).graph.ops
    assert [(node.window, node.soft_cap) for node in nodes if node.op == "attention"] == [
        (4096, 50),
        (0, 50),
        (4096, 50),
    ]
    assert [node.soft_cap for node in nodes if node.op == "soft_cap"] == [30]


def test_gpt_oss_states_its_window(tmp_path):
    made = make_checkpoint("gpt-oss", tmp_path / "folder")
    with pytest.raises(kernelmux.errors.ModelError, match=r"lacks gpt-oss\.attention\.sliding_window, which"):
        kernelmux.load(without(made.folder, tmp_path, "attention.sliding_window"))


@pytest.mark.parametrize("name", ["olmo2", "gpt-oss"])
def test_a_head_is_not_taken_from_the_embeddings_where_files_have_their_own(tmp_path, name):
    made = make_checkpoint(name, tmp_path / "folder")
    whole = write_gguf_of(made.folder, kernelmux.load(made.folder).source.shape, tmp_path / "whole.gguf")
    file = read(whole)
    weights = {weight.name: weight.dequantize().numpy() for weight in file.weights.values()}
    del weights["output.weight"]
    metadata = {key: value for key, value in file.metadata.items() if key != "general.architecture"}
    with pytest.raises(kernelmux.errors.ModelError, match=r"tensor 'output\.weight' is missing"):
        kernelmux.load(write_gguf(tmp_path / "headless.gguf", name, metadata, weights))
