"""Folders of MXFP4 weights, opened as what their blocks say, or refused in one line."""

import pytest
import torch

from kernelmux.models.module import Module
from kernelmux.models.mxfp4_weights import expert_parameters
from kernelmux.models.safetensors import read_planes, write_safetensors
from quantized_folders import compressed, matrices, opens_alike, refused, save

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def mxfp4(shape, seed=0):
    """Bytes [..., k/2] and scales [..., k/32] of numbers drawn one by one, and the numbers."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, shape, generator=generator)
    scales = torch.randint(120, 125, (*shape[:-1], shape[-1] // 32), generator=generator)
    numbers = torch.tensor(E2M1)[codes] * 2.0 ** (scales.repeat_interleave(32, dim=-1) - 127)
    packed = codes[..., 0::2] + 16 * codes[..., 1::2]
    return packed.to(torch.uint8), scales.to(torch.uint8), numbers


def scheme(**more):
    weights = {"type": "float", "num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32, **more}
    return compressed({**weights, "dynamic": False, "scale_dtype": "torch.uint8"}, "mxfp4-pack-quantized")


def test_compressed_weights_are_their_numbers(tmp_path):
    made = {}
    for seed, (name, like) in enumerate(matrices().items()):
        packed, scales, numbers = mxfp4(like.shape, seed)
        made[name] = {"weight_packed": packed, "weight_scale": scales}, numbers
    model = opens_alike(tmp_path, made, scheme())
    weight = model.source.file.weights["blk.0.ffn_down.weight"]
    assert weight.format == "MXFP4"
    assert weight.dequantize().equal(made["model.layers.0.mlp.down_proj"][1])


def test_parameters_of_all_experts_are_their_numbers(tmp_path):
    packed, scales, numbers = mxfp4((3, 6, 64))
    stored = {"gate_up_proj_blocks": packed.view(3, 6, 2, 16), "gate_up_proj_scales": scales}
    with open(tmp_path / "experts.safetensors", "wb") as file:
        write_safetensors(stored, file)
    planes, _ = read_planes(tmp_path / "experts.safetensors")
    (weight,) = expert_parameters(Module(tmp_path, "model.layers.0.mlp.experts", planes))
    assert (weight.name, weight.shape) == ("model.layers.0.mlp.experts.gate_up_proj", (3, 6, 64))
    assert weight.dequantize().equal(numbers)
    assert planes == {}


FAULTS = {
    "nvfp4": (scheme(group_size=16), {}, "weights.group_size = 16: 32 is built in"),
    "other scales": (scheme(), {"weight_scale": torch.zeros(256, 8)}, r"weight_scale is float32 \[256, 8\]; uint8 "),
    "no scales": (scheme(), {"weight_scale": None}, "tensor weight_scale is missing"),
}


@pytest.mark.parametrize(("quantization", "changes", "message"), FAULTS.values(), ids=FAULTS)
def test_what_is_not_built_in_is_refused(tmp_path, quantization, changes, message):
    stored = {f"{name}.weight": numbers for name, numbers in matrices().items()}
    gate = "model.layers.0.mlp.gate_proj"
    packed, scales, _ = mxfp4((256, 128))
    parts = {"weight_packed": packed, "weight_scale": scales, **changes}
    stored |= {f"{gate}.{end}": part for end, part in parts.items() if part is not None}
    del stored[f"{gate}.weight"]
    refused(save(tmp_path / "folder", stored, quantization), message)
