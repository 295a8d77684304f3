"""Folders of a tiny llama with quantised weights, packed number by number as other libraries' layouts say."""

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


def opens_alike(tmp_path, made, quantization, **changes):
    """Whether a folder of quantised modules `{name: (tensors by ending, numbers)}` has the logits of its numbers."""
    stored = {f"{name}.{end}": part for name, (parts, _) in made.items() for end, part in parts.items()}
    quantised = save(tmp_path / "quantised", stored, quantization, **changes)
    plain = save(tmp_path / "plain", {f"{name}.weight": numbers for name, (_, numbers) in made.items()}, **changes)
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
    spread = scale.float().repeat_interleave(128, dim=0)[:n].repeat_interleave(128, dim=1)
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


EXPERT = {"w1": (WIDE, WIDTH), "w2": (WIDTH, WIDE), "w3": (WIDE, WIDTH)}
MIXTURE = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}


def nibbles(rows):
    """int32 of eight numbers from 0 to 15 each, the first in the lowest bits, written number by number."""
    packed = []
    for row in rows.tolist():
        words = [sum(q << 4 * place for place, q in enumerate(row[at : at + 8])) for at in range(0, len(row), 8)]
        packed.append([word - (1 << 32) if word >= 1 << 31 else word for word in words])
    return torch.tensor(packed, dtype=torch.int32)


def integers(numbers, group, dtype, symmetric=False):
    """q [n, k], scales and zero points [n, groups] near to numbers, and the numbers that these are."""
    n, k = numbers.shape
    parts = numbers.view(n, k // group, group)
    if symmetric:
        zeros = torch.full(parts.shape[:2], 8)
        scales = (parts.abs().amax(dim=2) / 7).to(dtype)
    else:
        least, most = parts.amin(dim=2), parts.amax(dim=2)
        scales = ((most - least) / 15).to(dtype)
        zeros = (-least / scales.float()).round().long().clamp(1, 15)
    steps = scales.float()[..., None]
    q = (parts / steps + zeros[..., None]).round().long().clamp(0, 15)
    return q.view(n, k), scales, zeros, (steps * (q - zeros[..., None])).view(n, k)


def gptq(numbers, group=64, dtype=torch.float16, less=1, symmetric=False, order=None):
    """`order`: groups are of inputs in that order, as by desc_act."""
    k = numbers.shape[1]
    order = torch.arange(k) if order is None else order
    back_again = order.argsort()
    q, scales, zeros, back = integers(numbers[:, order], group, dtype, symmetric)
    q, back, g_idx = q[:, back_again], back[:, back_again], back_again // group
    parts = {"qweight": nibbles(q.T.reshape(k // 8, 8, -1).transpose(1, 2).reshape(-1, 8)).view(k // 8, -1)}
    parts |= {"scales": scales.T, "qzeros": nibbles(zeros.T - less)}
    return parts | {"g_idx": g_idx.int()}, back


def shuffled(make, **more):
    """Modules by `make` whose inputs of a group lie anywhere."""
    generator = torch.Generator().manual_seed(7)
    return lambda numbers: make(numbers, order=torch.randperm(numbers.shape[1], generator=generator), **more)


def awq(numbers, group=64, dtype=torch.float16):
    q, scales, zeros, back = integers(numbers, group, dtype)

    def packed(rows):
        places = [0, 2, 4, 6, 1, 3, 5, 7]
        return nibbles(torch.cat([rows[:, at : at + 8][:, places] for at in range(0, rows.shape[1], 8)], dim=1))

    return {"qweight": packed(q.T), "qzeros": packed(zeros.T), "scales": scales.T}, back


def pack_quantized(numbers, group=64, dtype=torch.bfloat16, symmetric=False, unpacked=False, order=None):
    order = torch.arange(numbers.shape[1]) if order is None else order
    back_again = order.argsort()
    q, scales, zeros, back = integers(numbers[:, order], group, dtype, symmetric)
    q, back = q[:, back_again], back[:, back_again]
    parts = {"weight_packed": nibbles(q), "weight_scale": scales, "weight_shape": torch.tensor(numbers.shape)}
    if unpacked:
        parts["weight_zero_point"] = (zeros - 8).to(torch.int8)
    elif not symmetric:
        parts["weight_zero_point"] = nibbles(zeros.T).T
    return parts | {"weight_g_idx": (back_again // group).int()}, back


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False, "damp_percent": 0.01}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}


def int4_scheme(strategy="group", **more):
    scheme = {"type": "int", "num_bits": 4, "symmetric": False, "strategy": strategy, "group_size": 64}
    return compressed({**scheme, "actorder": "weight", "observer": "minmax", **more}, "pack-quantized")


def rowwise(make):
    return lambda numbers: make(numbers, group=numbers.shape[1])
