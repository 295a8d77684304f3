"""gpt-oss in files as people have them: GGUF with experts in MXFP4, and what is wrong with folders."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

import kernelmux
from kernelmux.errors import ModelError
from kernelmux.models.folder import read_folder
from tiny_model import write_gguf

KEYS = {"block_count": 3, "context_length": 64, "embedding_length": 64, "feed_forward_length": 32, "vocab_size": 80}
KEYS |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16}
KEYS |= {"attention.value_length": 16, "attention.layer_norm_rms_epsilon": 1e-5, "attention.sliding_window": 5}
KEYS |= {"expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": 32, "rope.freq_base": 150_000.0}
KEYS |= {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
IDS = torch.randint(3, 80, (19,), generator=torch.Generator().manual_seed(1)).tolist()


def tensors():
    """Those of a file of three layers, in float32."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd.weight": (80, 64), "output.weight": (80, 64), "output_norm.weight": (64,)}
    for layer in range(3):
        own = {"attn_norm": (64,), "post_attention_norm": (64,), "attn_sinks": (4,), "ffn_gate_inp": (5, 64)}
        own |= {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
        own |= {"ffn_gate_exps": (5, 32, 64), "ffn_up_exps": (5, 32, 64), "ffn_down_exps": (5, 64, 32)}
        for name, shape in own.items():
            shapes[f"blk.{layer}.{name}.weight"] = shape
            if len(shape) > 1:
                shapes[f"blk.{layer}.{name}.bias"] = shape[:-1]
    return {name: (torch.randn(s, generator=generator) * s[-1] ** -0.5).numpy() for name, s in shapes.items()}


def write(path, weights, **changes):
    metadata = {f"gpt-oss.{key}": value for key, value in {**KEYS, **changes}.items()}
    return write_gguf(path, "gpt-oss", metadata, weights, Kind.F32)


def in_mxfp4(weights, path):
    """The file whose experts' matrices are MXFP4, and the same with these rounded as it is."""
    writer, rounded = gguf.GGUFWriter(path, "gpt-oss"), {}
    for key, value in KEYS.items():
        kind = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}
        writer.add_key_value(f"gpt-oss.{key}", value, kind[type(value)])
    for name, weight in weights.items():
        stored = Kind.MXFP4 if weight.ndim == 3 else Kind.F32
        data = gguf.quantize(weight, stored)
        rounded[name] = gguf.dequantize(data, stored)
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, rounded


def test_experts_in_mxfp4_by_the_default_choice(without_numba, tmp_path):
    path, rounded = in_mxfp4(tensors(), tmp_path / "mxfp4.gguf")
    model, dense = kernelmux.load(path), kernelmux.load(write(tmp_path / "dense.gguf", rounded))
    exact = model.forward(IDS, model.plan(use=("*=reference:f64",)))
    assert exact.equal(dense.forward(IDS, dense.plan(use=("*=reference:f64",))))
    plan = model.plan()
    chosen = {step.node.op: step.choice.kernel.full_name for step in plan.steps}
    assert chosen["attention"] == "torch:sdpa"
    assert chosen["clamped_swiglu"] == "torch:f32"
    wanted, found = (logits.log_softmax(dim=-1) for logits in (exact, model.forward(IDS, plan)))
    assert float((wanted.exp() * (wanted - found)).sum(dim=-1).mean()) < 1e-3


def test_every_second_layer_sees_a_window_and_yarn_is_not_truncated(tmp_path):
    graph = kernelmux.load(write(tmp_path / "m.gguf", tensors())).graph
    assert [node.window for node in graph.ops if node.op == "attention"] == [5, 0, 5]
    (rotation,) = {node.rotation for node in graph.ops if node.op == "rope"}
    assert not rotation.truncate


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("blk.1.attn_sinks.weight", "tensor 'blk.1.attn_sinks.weight' is missing"),
        ("blk.2.ffn_up_exps.weight", "tensor 'blk.2.ffn_up_exps.weight' is missing"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, gone, message):
    weights = tensors()
    del weights[gone]
    with pytest.raises(ModelError, match=message):
        kernelmux.load(write(tmp_path / "m.gguf", weights))


def test_sinks_of_other_heads_and_biases_of_other_experts_are_told(tmp_path):
    for name, shape in (("attn_sinks.weight", (3,)), ("ffn_up_exps.bias", (4, 32))):
        weights = {**tensors(), f"blk.0.{name}": np.zeros(shape, np.float32)}
        with pytest.raises(ModelError, match=rf"'blk.0.{name}' is \({shape[0]},"):
            kernelmux.load(write(tmp_path / "m.gguf", weights))


def test_without_experts_it_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"gpt-oss.expert_count = 0: a gpt-oss model has experts"):
        kernelmux.load(write(tmp_path / "m.gguf", tensors(), expert_count=0, expert_used_count=0))


def test_gates_and_ups_of_a_folder_take_turns(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 8, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 40, "num_local_experts": 3}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, num_experts_per_tok=2))
    model.save_pretrained(tmp_path)
    weights, experts = read_folder(tmp_path).weights, model.model.layers[0].mlp.experts
    for part, first in (("gate", 0), ("up", 1)):
        stored = weights[f"blk.0.ffn_{part}_exps.weight"]
        assert stored.shape == (3, 8, 32)
        assert stored.planes[0].equal(experts.gate_up_proj[:, :, first::2].mT)
        # In pieces too, as it goes to a device.
        (plane,) = stored.stored
        pieces = b"".join(
            bytes(plane.read(start, min(1000, plane.nbytes - start))) for start in range(0, plane.nbytes, 1000)
        )
        assert pieces == stored.planes[0].contiguous().numpy().tobytes()
        assert weights[f"blk.0.ffn_{part}_exps.bias"].planes[0].equal(experts.gate_up_proj_bias[:, first::2])
    assert weights["blk.0.ffn_down_exps.weight"].planes[0].equal(experts.down_proj.mT)


def test_a_folder_in_mxfp4_is_the_folder_of_its_numbers(tmp_path):
    """Blocks as transformers stores them: two numbers a byte, neighbours in the low and the high bits."""
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 80, "num_local_experts": 3}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, num_experts_per_tok=2))
    generator, experts = torch.Generator().manual_seed(0), model.model.layers[0].mlp.experts
    levels, stored = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]), {}
    levels = torch.cat([levels, -levels])
    for name, outputs, inputs in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
        codes = torch.randint(16, (3, outputs, inputs // 32, 32), generator=generator)
        scales = torch.randint(121, 126, (3, outputs, inputs // 32), generator=generator)
        numbers = levels[codes] * torch.exp2(scales - 127.0).unsqueeze(-1)
        getattr(experts, name).data = numbers.flatten(2).mT.contiguous()
        key = f"model.layers.0.mlp.experts.{name}"
        stored[f"{key}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        stored[f"{key}_scales"] = scales.to(torch.uint8)
    folder = tmp_path / "mxfp4"
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    rest = {name: weight for name, weight in weights.items() if f"{name}_blocks" not in stored}
    save_file({**rest, **stored}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    opened = kernelmux.load(folder)
    assert {node.weight[0].format for node in opened.graph.ops if node.op == "mul_mat_id"} == {"MXFP4"}
    with torch.no_grad():
        truth = model(torch.tensor([IDS])).logits[0]
    assert float((opened.forward(IDS, opened.plan(use=("*=reference:f32",))) - truth).abs().max()) < 1e-4
