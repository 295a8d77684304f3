"""Quantised folders: the layouts that other libraries write, opened as what they say, or refused in one line."""

import json

import pytest
import torch

import kernelmux
from kernelmux.errors import ModelError

WIDTH, WIDE, KV = 128, 256, 64
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": WIDTH,
    "intermediate_size": WIDE,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
MATRICES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KV, WIDTH),
    "self_attn.v_proj": (KV, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (WIDE, WIDTH),
    "mlp.up_proj": (WIDE, WIDTH),
    "mlp.down_proj": (WIDTH, WIDE),
}
NORMS = ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
GATE = "model.layers.0.mlp.gate_proj"


def noise(name, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) * shape[-1] ** -0.5


def matrices():
    """The modules that are quantised, and what their numbers are drawn as."""
    return {f"model.layers.0.{name}": noise(name, *shape) for name, shape in MATRICES.items()}


def save(folder, tensors, quantization=None, **changes):
    library = pytest.importorskip("safetensors.torch")
    plain = {f"{name}.weight": 1 + noise(name, WIDTH) for name in NORMS}
    plain["model.embed_tokens.weight"] = noise("embed", 40, WIDTH)
    folder.mkdir(exist_ok=True)
    library.save_file(
        {**plain, **{name: part.contiguous() for name, part in tensors.items()}}, folder / "model.safetensors"
    )
    said = CONFIG | changes | ({} if quantization is None else {"quantization_config": quantization})
    (folder / "config.json").write_text(json.dumps(said), "utf-8")
    return folder


def logits(folder):
    model = kernelmux.load(folder)
    return model.forward([1, 2, 3, 4], model.plan(use=["*=reference"]))


def opens_alike(tmp_path, made, quantization):
    """Whether a folder of quantised modules `{name: (tensors by ending, numbers)}` has the logits of its numbers."""
    stored = {f"{name}.{end}": part for name, (parts, _) in made.items() for end, part in parts.items()}
    quantised = save(tmp_path / "quantised", stored, quantization)
    plain = save(tmp_path / "plain", {f"{name}.weight": numbers for name, (_, numbers) in made.items()})
    assert (logits(quantised) - logits(plain)).abs().max() < 1e-4
    return kernelmux.load(quantised)


def refused(folder, message):
    with pytest.raises(ModelError, match=message) as caught:
        kernelmux.load(folder)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder))


def fp8(numbers, scale):
    """e4m3 values, and the numbers that they are with a scale for each."""
    data = (numbers / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return data, data.float() * scale


def fp8_tensor(numbers, dtype=torch.float32):
    scale = (numbers.abs().max() / 448).to(dtype)
    data, back = fp8(numbers, scale.float())
    return {"weight": data, "weight_scale": scale}, back


def fp8_row(numbers, dtype=torch.float32):
    scale = (numbers.abs().amax(dim=1, keepdim=True) / 448).to(dtype)
    data, back = fp8(numbers, scale.float())
    return {"weight": data, "weight_scale": scale}, back


def fp8_block(numbers, dtype=torch.float32):
    n, k = numbers.shape
    scale = torch.empty(-(-n // 128), k // 128)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            scale[i, j] = numbers[128 * i : 128 * i + 128, 128 * j : 128 * j + 128].abs().max() / 448
    scale = scale.to(dtype)
    spread = torch.tensor([[float(scale[row // 128, column // 128]) for column in range(k)] for row in range(n)])
    data, back = fp8(numbers, spread)
    return {"weight": data, "weight_scale_inv": scale}, back


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
FP8_BLOCKS = {**FP8, "weight_block_size": [128, 128]}


def compressed(weights, format="float-quantized", activations=None, **more):
    group = {"weights": weights, "input_activations": activations, "output_activations": None, "targets": ["Linear"]}
    said = {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}
    return {**said, "ignore": ["lm_head"], "quantization_status": "compressed", "kv_cache_scheme": None, **more}


def fp8_scheme(strategy, **more):
    scheme = {"type": "float", "num_bits": 8, "symmetric": True, "strategy": strategy, "dynamic": False}
    return {**scheme, "group_size": None, "block_structure": None, "observer": "minmax", "actorder": None, **more}


LAYOUTS = {
    "fp8 blocks": (fp8_block, FP8_BLOCKS, "fp8_128x128"),
    "fp8 tensor": (fp8_tensor, {**FP8, "activation_scheme": "static"}, "fp8_tensor"),
    "fp8 rows": (fp8_row, FP8, "fp8_row"),
    "compressed tensor": (fp8_tensor, compressed(fp8_scheme("tensor"), "naive-quantized"), "fp8_tensor"),
    "compressed rows": (fp8_row, compressed(fp8_scheme("channel"), activations={"dynamic": True}), "fp8_row"),
    "compressed blocks": (fp8_block, compressed(fp8_scheme("block", block_structure=[128, 128])), "fp8_128x128"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "quantization", "format"), LAYOUTS.values(), ids=LAYOUTS)
def test_fp8_weights_are_their_numbers(tmp_path, make, quantization, format, dtype):
    made = {name: make(numbers, dtype) for name, numbers in matrices().items()}
    model = opens_alike(tmp_path, made, quantization)
    assert model.graph.values["blk.0.ffn_down.weight"].format == format
    weight = model.source.file.weights["blk.0.ffn_gate.weight"]
    assert weight.dequantize().equal(made[GATE][1])
    assert weight.nbytes == sum(plane.nbytes for plane in weight.planes)


def test_modules_that_are_not_quantised_lie_beside_those_that_are(tmp_path):
    made = {name: fp8_row(numbers) for name, numbers in matrices().items()}
    numbers = matrices()[GATE]
    made[GATE] = {"weight": numbers}, numbers
    model = opens_alike(tmp_path, made, compressed(fp8_scheme("channel"), ignore=[GATE]))
    formats = [model.graph.values[f"blk.0.ffn_{part}.weight"].format for part in ("gate", "up")]
    assert formats == ["f32", "fp8_row"]


def test_scales_of_activations_and_caches_are_said_not_to_be_used(tmp_path):
    made = {name: fp8_tensor(numbers) for name, numbers in matrices().items()}
    for parts, _ in made.values():
        parts["input_scale"] = torch.tensor([0.5])
    made["model.layers.0.self_attn.k_proj"][0]["output_scale"] = torch.tensor(0.25)
    scheme = compressed(fp8_scheme("tensor"), activations={"dynamic": False}, kv_cache_scheme={"num_bits": 8})
    model = opens_alike(tmp_path, made, scheme)
    notes = " ".join(model.source.file.notes)
    assert "activations are not used" in notes
    assert "caches are not used" in notes


EXPERT = {"w1": (WIDE, WIDTH), "w2": (WIDTH, WIDE), "w3": (WIDE, WIDTH)}
MIXTURE = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}


@pytest.mark.parametrize("make", [fp8_tensor, fp8_row, fp8_block])
def test_experts_of_a_layer_are_one_weight(tmp_path, make):
    made = {name: make(numbers) for name, numbers in matrices().items() if "mlp" not in name}
    moe = "model.layers.0.block_sparse_moe"
    for number in range(2):
        experts = {f"{moe}.experts.{number}.{name}": noise(f"{name}{number}" * 3, *e) for name, e in EXPERT.items()}
        made |= {name: make(numbers * (1 + number)) for name, numbers in experts.items()}
    gate = {f"{moe}.gate.weight": noise("gate", 2, WIDTH)}
    stored = {f"{name}.{end}": part for name, (parts, _) in made.items() for end, part in parts.items()}
    quantised = save(tmp_path / "quantised", stored | gate, FP8_BLOCKS if make is fp8_block else FP8, **MIXTURE)
    numbers = {f"{name}.weight": back for name, (_, back) in made.items()}
    plain = save(tmp_path / "plain", numbers | gate, **MIXTURE)
    assert (logits(quantised) - logits(plain)).abs().max() < 1e-4


FAULTS = {
    "method": ({"quant_method": "bitsandbytes"}, "quant_method = 'bitsandbytes': it is not built in; known: "),
    "none": ({}, "quantization_config.quant_method = None: it is not built in"),
    "list": ([1], r"quantization_config = \[1\]: an object is needed"),
    "block": ({**FP8, "weight_block_size": [64, 64]}, r"weight_block_size = \[64, 64\]: \[128, 128\] is built in"),
    "fp4": ({**FP8, "expert_dtype": "fp4"}, "expert_dtype = 'fp4': 'fp8' is built in"),
    "key": ({**FP8, "rotation": 3}, "quantization_config.rotation = 3: it is not built in, and would be ignored"),
    "bits": (compressed(fp8_scheme("channel", num_bits=4)), r"group_0.weights.num_bits = 4: 8 is built in"),
    "format": (compressed(fp8_scheme("tensor"), "nvfp4-pack-quantized"), "format = 'nvfp4-pack-quantized': .*naive"),
    "sparse": (compressed(fp8_scheme("tensor"), sparsity_config={"format": "sparse-24"}), "'dense' is built in"),
    "groups": ({**compressed(fp8_scheme("tensor")), "config_groups": {}}, "the scheme of each group of modules is"),
}


@pytest.mark.parametrize(("quantization", "message"), FAULTS.values(), ids=FAULTS)
def test_what_is_not_built_in_is_refused_by_name(tmp_path, quantization, message):
    stored = {f"{name}.weight": numbers for name, numbers in matrices().items()}
    refused(save(tmp_path / "folder", stored, quantization), message)


DAMAGES = {
    "no scale": ({"weight_scale": None}, f"module '{GATE}': tensor weight_scale_inv or weight_scale is missing"),
    "a scale more": ({"weight_scale_inv": torch.ones(1)}, "'model.layers.0.mlp.gate_proj.weight_scale': llama models"),
    "other scales": ({"weight_scale": torch.ones(7, 1)}, r"with scales \[7, 1\]; one, one a row, or one for 128 rows"),
    "integers": ({"weight_scale": torch.ones(WIDE, 1, dtype=torch.int32)}, "scales are stored as int32; floats are"),
    "zero points": ({"weight_zero_point": torch.zeros(WIDE, 1, dtype=torch.int8)}, "weight_zero_point of int8"),
    "a cube": ({"weight": torch.zeros(2, 8, WIDTH).to(torch.float8_e4m3fn)}, "a matrix is needed"),
}


@pytest.mark.parametrize(("changes", "message"), DAMAGES.values(), ids=DAMAGES)
def test_what_does_not_go_together_is_refused_by_name(tmp_path, changes, message):
    made = {name: fp8_row(numbers)[0] for name, numbers in matrices().items()}
    made[GATE] = {end: part for end, part in {**made[GATE], **changes}.items() if part is not None}
    stored = {f"{name}.{end}": part for name, parts in made.items() for end, part in parts.items()}
    refused(save(tmp_path / "folder", stored, FP8), message)


def test_rows_that_do_not_divide_into_blocks_are_refused(tmp_path):
    made = {name: fp8_row(numbers)[0] for name, numbers in matrices().items()}
    made[GATE] = {"weight": torch.zeros(128, 192).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 2)}
    stored = {f"{name}.{end}": part for name, parts in made.items() for end, part in parts.items()}
    refused(save(tmp_path / "folder", stored, FP8_BLOCKS), "stores rows in blocks of 128, 192 columns do not divide")
