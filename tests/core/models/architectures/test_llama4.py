"""llama4 as people have it: GGUF that states less than folders, folders with parts for images, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import kernelmux
from checkpoints import IDS, make_checkpoint, write_gguf_of
from kernelmux.errors import ModelError

pytest.importorskip("transformers", reason="transformers, whose checkpoint is changed here, is not installed")

EXACT = ("*=reference:f32",)


@pytest.fixture
def folder(tmp_path):
    return make_checkpoint("llama4", tmp_path / "folder").folder


def edited(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "left out"}))
    return folder


def attending(model):
    """Of each layer its chunk, whether it turns, whether queries are tempered, whether heads are normed."""
    nodes = {(node.op, node.layer): node for node in model.graph.ops}
    layers = range(model.source.shape.layers)
    ops = ("rope", "temper", "qk_norm")
    return [(nodes["attention", layer].chunk, *((op, layer) in nodes for op in ops)) for layer in layers]


def test_gguf_files_state_less(folder, tmp_path):
    """What they have no keys for is the same of all."""
    shape = kernelmux.load(folder).source.shape
    own = (
        "chunk_size",
        "chunk_pattern",
        "use_qk_norm",
        "temperature_tuning",
        "temperature_scale",
        "temperature_length",
    )
    left_out = {f"llama4.attention.{key}": None for key in own} | {"llama4.rope.layers": None}
    left_out |= {"llama4.expert_layers": None, "llama4.rope.layer_interval": None}
    turning, others = (8192, True, False, True), (0, False, True, False)
    usual = [turning, turning, turning, others, turning]
    model = kernelmux.load(write_gguf_of(folder, shape, tmp_path / "usual.gguf", left_out))
    assert attending(model) == usual
    (tempered,) = (node for node in model.graph.ops if node.op == "temper")
    assert (tempered.scale, tempered.span) == (0.1, 8192)
    small = write_gguf_of(folder, shape, tmp_path / "small.gguf", left_out | {"llama4.attention.sliding_window": 0})
    assert attending(kernelmux.load(small)) == [(0, True, False, True)] * 5
    odd = write_gguf_of(folder, shape, tmp_path / "odd.gguf", left_out | {"llama4.attention.sliding_window": 512})
    with pytest.raises(ModelError, match="llama4 has chunks of 8192 positions, or says 0: none"):
        kernelmux.load(odd)


def test_older_folders_say_the_same_otherwise(folder):
    before = kernelmux.load(folder)
    wanted = before.forward(IDS, before.plan(use=EXACT))
    edited(folder, no_rope_layers=[], layer_types="left out", moe_layers="left out", attn_temperature_tuning=4)
    found = kernelmux.load(folder)
    assert attending(found) == attending(before)
    assert found.forward(IDS, found.plan(use=EXACT)).equal(wanted)
    assert [chunk for chunk, *_ in attending(kernelmux.load(edited(folder, attention_chunk_size=None)))] == [0] * 5


def test_the_text_of_a_model_of_images(folder, tmp_path):
    before = kernelmux.load(folder)
    wanted = before.forward(IDS, before.plan(use=EXACT))
    whole = tmp_path / "whole"
    whole.mkdir()
    text = json.loads((folder / "config.json").read_text())
    config = {"model_type": "llama4", "text_config": text, "vision_config": {"hidden_size": 8}, "image_token_index": 7}
    (whole / "config.json").write_text(json.dumps(config))
    tensors = {f"language_model.{name}": part for name, part in load_file(folder / "model.safetensors").items()}
    others = {
        "vision_model.class_embedding": torch.zeros(8),
        "multi_modal_projector.linear_1.weight": torch.zeros(8, 8),
    }
    save_file(tensors | others, whole / "model.safetensors")
    found = kernelmux.load(whole)
    assert found.forward(IDS, found.plan(use=EXACT)).equal(wanted)
    with pytest.raises(ModelError, match="text_config = 3: an object is needed"):
        kernelmux.load(edited(whole, text_config=3))


def test_experts_may_be_modules_of_their_own(folder):
    """As in folders that llm-compressor quantises."""
    before = kernelmux.load(folder)
    wanted, tensors = before.forward(IDS, before.plan(use=EXACT)), load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        stem, _, parameter = name.rpartition(".")
        for number, whole in enumerate(tensors.pop(name)):
            parts = (
                {"gate_proj": whole[:, :40], "up_proj": whole[:, 40:]} if "gate" in parameter else {"down_proj": whole}
            )
            own = {f"{stem}.{number}.{part}.weight": numbers.T.contiguous() for part, numbers in parts.items()}
            tensors |= own
    save_file(tensors, folder / "model.safetensors")
    found = kernelmux.load(folder)
    assert found.forward(IDS, found.plan(use=EXACT)).equal(wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 2}, "llama4.expert_used_count = 2: a llama4 model has experts, of which each row is"),
        ({"moe_layers": [0, 9]}, "llama4.expert_layers = .*: a list of layers from 0 to 4 is needed"),
        ({"moe_layers": [0, 2]}, "tensor 'blk.1.ffn_gate.weight' is missing"),
        ({"layer_types": ["sliding_attention"] * 5}, "'sliding_attention' is not built in"),
        ({"attn_temperature_tuning": "yes"}, "attention.temperature_tuning = 'yes': true or false is needed"),
    ],
)
def test_what_is_not_built_in_is_refused(folder, changes, message):
    with pytest.raises(ModelError, match=message):
        kernelmux.load(edited(folder, **changes))
