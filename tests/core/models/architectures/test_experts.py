"""Mixtures of experts in files as people have them: quantised, and damaged."""

from __future__ import annotations

import json

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

import kernelmux
from kernelmux.contract.device import find_device
from kernelmux.errors import ModelError
from kernelmux.models.folder import read_folder
from kernelmux.models.gguf import read
from kernelmux.models.targets import targets
from kernelmux.run.quantized import write_quantized
from tiny_model import experts_apart, write_gguf

SIZES = {"block_count": 2, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96, "vocab_size": 80}
SIZES |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5}
SIZES |= {"expert_count": 5, "expert_used_count": 2}
IDS = torch.randint(3, 80, (19,), generator=torch.Generator().manual_seed(1)).tolist()


def write_mixtral(path, kind=Kind.F32, rename=lambda name: name, apart=False, **changes):
    """A llama with experts, its matrices stored as `kind`; `apart` as older files have them, one tensor each."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (80, 64), "output_norm": (64,)}
    for layer in range(2):
        own = {"attn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
        own |= {"ffn_norm": (64,), "ffn_gate_inp": (5, 64), "ffn_down_exps": (5, 64, 96)}
        own |= {f"ffn_{part}_exps": (5, 96, 64) for part in ("gate", "up")}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in own.items()}
    tensors = {
        f"{name}.weight": (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).numpy()
        for name, shape in shapes.items()
    }
    if apart:
        tensors = experts_apart(tensors)
    metadata = {f"llama.{key}": value for key, value in {**SIZES, **changes}.items()}
    tensors = {rename(name): part for name, part in tensors.items() if rename(name)}
    return write_gguf(path, "llama", metadata, tensors, kind)


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q4_0", "Q8_0"])
def test_the_default_choice_is_near_the_reference(without_numba, tmp_path, kind):
    model = kernelmux.load(write_mixtral(tmp_path / "m.gguf", Kind[kind]))
    plans = model.plan(use=("*=reference:f32",)), model.plan()
    chosen = {step.choice.kernel.full_name for step in plans[1].steps if step.node.op == "mul_mat_id"}
    assert chosen
    assert chosen <= {"torch:f32", "torch:bf16"}
    wanted, found = (model.forward(IDS, plan).log_softmax(dim=-1) for plan in plans)
    assert float((wanted.exp() * (wanted - found)).sum(dim=-1).mean()) < 1e-3
    session = [model.forward(IDS[:1], plan) for plan in plans]
    assert torch.allclose(*session, atol=0.1)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_older_files_with_a_tensor_for_each_expert_are_the_same_model(tmp_path, kind):
    files = [write_mixtral(tmp_path / f"{apart}.gguf", Kind[kind], apart=apart) for apart in (False, True)]
    one, other = map(kernelmux.load, files)
    for name, weight in one.source.file.weights.items():
        same = other.source.file.weights[name]
        assert (same.shape, same.format) == (weight.shape, weight.format)
        assert same.planes[0].equal(weight.planes[0])
    plans = [model.plan(use=("*=reference:f32",)) for model in (one, other)]
    assert one.forward(IDS, plans[0]).equal(other.forward(IDS, plans[1]))


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ("blk.1.ffn_up.2.weight", "", "blk.1.ffn_up_exps.weight: 4 experts, numbered from 0 on"),
        ("blk.1.ffn_up.4.weight", "blk.1.ffn_up.7.weight", "blk.1.ffn_up_exps.weight: 5 experts, numbered from 0 on"),
        ("blk.1.ffn_up.4.weight", "", r"'blk.1.ffn_up_exps.weight' is \(4, 96, 64\), the metadata asks for \(5, 96"),
        ("blk.1.ffn_norm.weight", "blk.1.ffn_up_exps.weight", "two tensors are blk.1.ffn_up_exps.weight, one of them"),
        ("blk.0.ffn_down.1.weight", "blk.0.ffn_down.01.weight", "blk.0.ffn_down_exps.weight: 4 experts, numbered"),
    ],
)
def test_experts_that_do_not_make_a_whole_are_refused(tmp_path, was, now, message):
    path = write_mixtral(tmp_path / "m.gguf", rename=lambda name: now if name == was else name, apart=True)
    with pytest.raises(ModelError, match=message):
        kernelmux.load(path)


def test_an_older_file_is_written_anew_with_one_tensor_for_all_experts(tmp_path):
    old, new = write_mixtral(tmp_path / "old.gguf", apart=True), tmp_path / "new.gguf"
    file = read(old)
    list(write_quantized(file, new, "f32", targets(file.weights.values(), "f32", []), find_device("cpu")))
    written = {tensor.name for tensor in GGUFReader(new).tensors}
    assert "blk.0.ffn_gate_exps.weight" in written
    assert "blk.0.ffn_gate.0.weight" not in written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_used_count": 6}, "llama.expert_used_count = 6: from 1 to the model's 5 experts are needed"),
        ({"expert_used_count": 0}, "llama.expert_used_count = 0: from 1 to the model's 5 experts are needed"),
        ({"expert_count": 4}, r"tensor 'blk.0.ffn_gate_inp.weight' is \(5, 64\), the metadata asks for \(4, 64\)"),
        ({"expert_count": 0, "expert_used_count": 0}, "tensor 'blk.0.ffn_gate.weight' is missing"),
        ({"expert_weights_scale": 2.5}, "llama.expert_weights_scale = 2.5: llama models are not built with this key"),
    ],
)
def test_keys_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(ModelError, match=message):
        kernelmux.load(write_mixtral(tmp_path / "m.gguf", **changes))


@pytest.fixture
def folder(tmp_path):
    """A folder of one layer and three experts, Qwen's names."""
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 40}
    config |= {"max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "num_experts": 3}
    config |= {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32)}
    shapes |= {"self_attn.o_proj": (32, 32), "self_attn.q_norm": (16,), "self_attn.k_norm": (16,), "mlp.gate": (3, 32)}
    shapes |= {"input_layernorm": (32,), "post_attention_layernorm": (32,)}
    for expert in range(3):
        shapes |= {f"mlp.experts.{expert}.{part}_proj": (8, 32) for part in ("gate", "up")}
        shapes |= {f"mlp.experts.{expert}.down_proj": (32, 8)}
    named = {f"model.layers.0.{module}.weight": shape for module, shape in shapes.items()}
    named |= {"model.embed_tokens.weight": (40, 32), "model.norm.weight": (32,)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({name: torch.randn(shape) for name, shape in named.items()}, tmp_path / "model.safetensors")
    return tmp_path


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_experts_of_a_folder_are_one_tensor(folder):
    stored, tensors = read_folder(folder).weights, load_file(folder / "model.safetensors")
    for part in ("gate", "up", "down"):
        own = [tensors[f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight"] for expert in range(3)]
        assert stored[f"blk.0.ffn_{part}_exps.weight"].planes[0].equal(torch.stack(own))
    model = kernelmux.load(folder)
    assert model.forward([1, 2, 3], model.plan(use=("*=reference:f32",))).isfinite().all()


def test_a_missing_expert_and_one_of_another_shape_are_told(folder):
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    told = "blk.0.ffn_up_exps.weight: 2 experts, numbered from 0 on and stored alike, are needed; one is missing"
    taken = {}
    change(folder, lambda tensors: taken.update(gone=tensors.pop(name)))
    with pytest.raises(ModelError, match=told):
        kernelmux.load(folder)
    change(folder, lambda tensors: tensors.update({name: taken["gone"].half()}))
    with pytest.raises(ModelError, match="3 experts, numbered from 0 on and stored alike, are needed"):
        kernelmux.load(folder)


def test_an_expert_that_is_there_twice_is_refused(folder):
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    change(folder, lambda tensors: tensors.update({name.replace(".1.", ".01."): tensors[name].clone()}))
    with pytest.raises(ModelError, match=r"two tensors are blk\.0\.ffn_up_exps\.weight, one of them"):
        kernelmux.load(folder)


@pytest.mark.parametrize(("key", "value"), [("decoder_sparse_step", 2), ("mlp_only_layers", [0])])
def test_layers_without_experts_are_refused(folder, key, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ModelError, match=f"{key} = "):
        kernelmux.load(folder)


def test_weights_are_renormalised_as_the_file_says(folder):
    config = json.loads((folder / "config.json").read_text())
    found = []
    for stated in ({}, {"norm_topk_prob": False}, {"norm_topk_prob": True}):
        (folder / "config.json").write_text(json.dumps({**config, **stated}))
        graph = kernelmux.load(folder).graph
        found += [node.renormalize for node in graph.ops if node.op == "route"]
    assert found == [False, False, True]
