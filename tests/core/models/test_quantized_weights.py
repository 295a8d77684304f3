"""Folders of FP8 weights: the layouts that other libraries write, opened as what they say, or refused in one line."""

import pytest
import torch

from quantized_folders import (
    EXPERT,
    FP8,
    FP8_BLOCKS,
    GATE,
    MIXTURE,
    WIDE,
    WIDTH,
    compressed,
    fp8_block,
    fp8_row,
    fp8_scheme,
    fp8_tensor,
    logits,
    matrices,
    noise,
    opens_alike,
    refused,
    save,
)

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
    "bits": (compressed(fp8_scheme("channel", num_bits=16)), "weights.num_bits = 16: 8 is built in"),
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
