"""Folders of 4-bit weights by GPTQ, AWQ and compressed-tensors, opened as what they say, or refused in one line."""

import json

import pytest
import torch

import kernelmux
from command import call_command
from kernelmux.errors import ModelError
from kernelmux.graph.formats import human_bytes
from kernelmux.models.stored import rows_of
from quantized_folders import (
    AWQ,
    EXPERT,
    FP8,
    FP8_BLOCKS,
    GATE,
    GPTQ,
    MATRICES,
    MIXTURE,
    WIDE,
    WIDTH,
    awq,
    fp8_block,
    fp8_row,
    fp8_tensor,
    gptq,
    int4_scheme,
    logits,
    matrices,
    noise,
    opens_alike,
    pack_quantized,
    refused,
    rowwise,
    save,
    shuffled,
)

INT4 = {
    "gptq": (gptq, {**GPTQ, "checkpoint_format": "gptq"}, "int4_64"),
    "gptq symmetric": (lambda w: gptq(w, 32, symmetric=True), {**GPTQ, "group_size": 32, "sym": True}, "int4_32"),
    "gptq v2": (lambda w: gptq(w, less=0), {**GPTQ, "checkpoint_format": "gptq_v2"}, "int4_64"),
    "gptq bf16": (lambda w: gptq(w, 128, torch.bfloat16), {**GPTQ, "group_size": 128}, "int4_128_bf16"),
    "gptq rows": (rowwise(gptq), {**GPTQ, "group_size": -1}, "int4_row"),
    "awq": (awq, AWQ, "int4_64"),
    "awq by older keys": (
        lambda w: awq(w, 128),
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "GEMM", "zero_point": True},
        "int4_128",
    ),
    "packed": (pack_quantized, int4_scheme(), "int4_64_bf16"),
    "packed symmetric": (lambda w: pack_quantized(w, symmetric=True), int4_scheme(symmetric=True), "int4_64_bf16"),
    "packed f16": (lambda w: pack_quantized(w, dtype=torch.float16), int4_scheme(), "int4_64"),
    "packed, zeros not": (lambda w: pack_quantized(w, unpacked=True), int4_scheme(), "int4_64_bf16"),
    "packed rows": (rowwise(pack_quantized), int4_scheme("channel", group_size=None), "int4_row_bf16"),
}


@pytest.mark.parametrize(("make", "quantization", "format"), INT4.values(), ids=INT4)
def test_4_bit_weights_are_their_numbers(tmp_path, make, quantization, format):
    made = {name: make(numbers) for name, numbers in matrices().items()}
    model = opens_alike(tmp_path, made, quantization)
    assert model.graph.values["blk.0.ffn_down.weight"].format == format
    for name, part in (("ffn_gate", "mlp.gate_proj"), ("attn_k", "self_attn.k_proj")):
        weight = model.source.file.weights[f"blk.0.{name}.weight"]
        assert weight.dequantize().equal(made[f"model.layers.0.{part}"][1])
        assert weight.nbytes == sum(plane.nbytes for plane in weight.planes)


@pytest.mark.parametrize("make", [gptq, awq])
def test_planes_that_are_unpacked_are_read_piece_by_piece_too(tmp_path, make):
    made = {name: make(numbers) for name, numbers in matrices().items()}
    stored = {f"{name}.{end}": part for name, (parts, _) in made.items() for end, part in parts.items()}
    folder = save(tmp_path / "folder", stored, GPTQ if make is gptq else AWQ)
    weight = kernelmux.load(folder).source.file.weights["blk.0.ffn_gate.weight"]
    for _ in range(2):
        for plane, whole in zip(weight.stored, weight.planes, strict=True):
            pieces = [
                bytes(plane.read(start, min(1000, plane.nbytes - start))) for start in range(0, plane.nbytes, 1000)
            ]
            assert b"".join(pieces) == whole.contiguous().view(torch.uint8).numpy().tobytes()
    some = rows_of(weight, "some", slice(3, 70))
    assert some.dequantize().equal(made[GATE][1][3:70])


INT4_FAULTS = {
    "bits": ({**GPTQ, "bits": 8}, "quantization_config.bits = 8: 4 is built in"),
    "groups": ({**GPTQ, "group_size": 48}, "group_size = 48: 32 or 64 or 128 or -1 is built in"),
    "marlin": ({**GPTQ, "checkpoint_format": "marlin"}, "'marlin': 'gptq' or 'gptq_v2' is built in"),
    "modules apart": ({**GPTQ, "dynamic": {"+:.*": {"bits": 8}}}, "dynamic = .*: {} is built in"),
    "gemv": ({**AWQ, "version": "gemv"}, "version = 'gemv': 'gemm' or 'GEMM' is built in"),
    "awq bits": ({**AWQ, "bits": 3}, "bits = 3: 4 is built in"),
    "integers of 8 bits": (int4_scheme(num_bits=8), "weights.num_bits = 8: 4 is built in"),
    "tensors": (int4_scheme("tensor"), "strategy = 'tensor': 'group' or 'channel' is built in"),
}


@pytest.mark.parametrize(("quantization", "message"), INT4_FAULTS.values(), ids=INT4_FAULTS)
def test_4_bits_in_another_way_are_refused_by_name(tmp_path, quantization, message):
    stored = {f"{name}.weight": numbers for name, numbers in matrices().items()}
    refused(save(tmp_path / "folder", stored, quantization), message)


def gate_of(make, **changes):
    """All modules by `make`, of the gate with other tensors."""
    made = {name: make(numbers)[0] for name, numbers in matrices().items()}
    made[GATE] = {end: part for end, part in {**made[GATE], **changes}.items() if part is not None}
    return {f"{name}.{end}": part for name, parts in made.items() for end, part in parts.items()}


def words(*shape):
    return torch.zeros(shape, dtype=torch.int32)


ACT_ORDER = {
    "gptq": (shuffled(gptq), {**GPTQ, "desc_act": True}),
    "gptq v2": (shuffled(gptq, less=0), {**GPTQ, "desc_act": True, "checkpoint_format": "gptq_v2"}),
    "gptq bf16": (shuffled(gptq, group=32, dtype=torch.bfloat16), {**GPTQ, "desc_act": True, "group_size": 32}),
    "packed": (shuffled(pack_quantized), int4_scheme(actorder="group")),
    "packed symmetric": (shuffled(pack_quantized, symmetric=True), int4_scheme(actorder="group", symmetric=True)),
}


@pytest.mark.parametrize(("make", "quantization"), ACT_ORDER.values(), ids=ACT_ORDER)
def test_groups_of_inputs_in_any_order_are_their_numbers(tmp_path, make, quantization):
    made = {name: make(numbers) for name, numbers in matrices().items()}
    model = opens_alike(tmp_path, made, quantization)
    for name, part in (("ffn_gate", "mlp.gate_proj"), ("attn_k", "self_attn.k_proj"), ("ffn_down", "mlp.down_proj")):
        weight = model.source.file.weights[f"blk.0.{name}.weight"]
        assert weight.format == "f32"
        assert weight.planes[0].equal(made[f"model.layers.0.{part}"][1])


def test_which_matrices_are_held_otherwise_is_told_with_what_they_weigh(tmp_path):
    order = shuffled(gptq)
    made = {name: (order if "mlp" in name else gptq)(numbers)[0] for name, numbers in matrices().items()}
    stored = {f"{name}.{end}": part for name, parts in made.items() for end, part in parts.items()}
    folder = save(tmp_path / "folder", stored, {**GPTQ, "desc_act": True})
    sizes = {name: sum(part.nbytes for part in parts.values()) for name, parts in made.items() if "mlp" in name}
    told = "3 matrices (mlp.down_proj, mlp.gate_proj, mlp.up_proj) are held as float32, in "
    told += f"{human_bytes(4 * 3 * WIDTH * WIDE)} instead of {human_bytes(sum(sizes.values()))}"
    (line,) = kernelmux.load(folder).source.file.held
    assert line.startswith(told)
    assert line in json.loads(call_command("info", folder, "--json").out)["notes"]
    assert line in call_command("plan", folder).err.replace("\n", " ")
    in_order = {f"{name}.{end}": part for name, w in matrices().items() for end, part in gptq(w)[0].items()}
    assert kernelmux.load(save(tmp_path / "folder", in_order, GPTQ)).source.file.held == ()


def test_experts_of_act_order_are_one_weight(tmp_path):
    moe, order = "model.layers.0.block_sparse_moe", shuffled(gptq)
    made = {name: order(numbers) for name, numbers in matrices().items() if "mlp" not in name}
    for number in range(2):
        named = {f"{moe}.experts.{number}.{name}": noise(f"{name}{number}" * 3, *e) for name, e in EXPERT.items()}
        made |= {name: order(numbers * (1 + number)) for name, numbers in named.items()}
    gate = {f"{moe}.gate.weight": noise("gate", 2, WIDTH)}
    stored = {f"{name}.{end}": part for name, (parts, _) in made.items() for end, part in parts.items()}
    quantised = save(tmp_path / "quantised", stored | gate, {**GPTQ, "desc_act": True}, **MIXTURE)
    plain = save(tmp_path / "plain", {f"{name}.weight": back for name, (_, back) in made.items()} | gate, **MIXTURE)
    assert (logits(quantised) - logits(plain)).abs().max() < 1e-4


UNEVEN = torch.cat([torch.zeros(65, dtype=torch.int32), torch.ones(63, dtype=torch.int32)])
BEYOND = torch.cat([torch.zeros(64, dtype=torch.int32), torch.full((64,), 2, dtype=torch.int32)])
INT4_DAMAGES = {
    "uneven groups": (gptq, GPTQ, {"g_idx": UNEVEN}, "g_idx: each of 2 groups needs as many of its 128 inputs"),
    "no such group": (gptq, GPTQ, {"g_idx": BEYOND}, "g_idx: each of 2 groups needs as many of its 128 inputs"),
    "no zero points": (gptq, GPTQ, {"qzeros": None}, "tensor qzeros is missing, of a module with g_idx"),
    "other zero points": (gptq, GPTQ, {"qzeros": words(3, 32)}, r"qzeros is int32 \[3, 32\]; int32 \[2, 32\] is read"),
    "scales in float32": (
        awq,
        AWQ,
        {"scales": torch.ones(2, WIDE)},
        "scales is float32 .*bfloat16 .any, 256. is",
    ),
    "groups of 16": (
        *(awq, AWQ, {"scales": torch.ones(8, WIDE).half(), "qzeros": words(8, WIDE // 8)}),
        "128 inputs in 8 groups; groups of 32, 64, 128, or a multiple of 32 in one, are built in",
    ),
    "another shape": (
        *(pack_quantized, int4_scheme(), {"weight_shape": torch.tensor([WIDE, 64])}),
        r"weight_shape is \[256, 64\], weight_packed is of \[256, 128\]",
    ),
    "uneven packed groups": (pack_quantized, int4_scheme(), {"weight_g_idx": UNEVEN}, "weight_g_idx: each of 2 groups"),
    "a tensor more": (awq, AWQ, {"g_scale": words(2)}, r"tensor g_scale of int32 \[2\] is not built in"),
}


@pytest.mark.parametrize(("make", "quantization", "changes", "message"), INT4_DAMAGES.values(), ids=INT4_DAMAGES)
def test_4_bit_tensors_that_do_not_go_together_are_refused(tmp_path, make, quantization, changes, message):
    refused(save(tmp_path / "folder", gate_of(make, **changes), quantization), f"module '{GATE}': .*{message}")


def test_a_zero_point_of_two_meanings_is_refused_when_it_is_read(tmp_path):
    stored = gate_of(gptq, qzeros=torch.full((2, WIDE // 8), -1, dtype=torch.int32))
    refused_later = kernelmux.load(save(tmp_path / "folder", stored, GPTQ))
    with pytest.raises(ModelError, match="qzeros has a 15, which stands for 16 or for 0"):
        refused_later.forward([1], refused_later.plan(use=["*=reference"]))


def test_experts_of_4_bit_groups_are_one_weight(tmp_path):
    moe = "model.layers.0.block_sparse_moe"
    made = {name: awq(numbers) for name, numbers in matrices().items() if "mlp" not in name}
    for number in range(2):
        named = {f"{moe}.experts.{number}.{name}": noise(f"{name}{number}" * 3, *e) for name, e in EXPERT.items()}
        made |= {name: awq(numbers * (1 + number)) for name, numbers in named.items()}
    gate = {f"{moe}.gate.weight": noise("gate", 2, WIDTH)}
    stored = {f"{name}.{end}": part for name, (parts, _) in made.items() for end, part in parts.items()}
    quantised = save(tmp_path / "quantised", stored | gate, AWQ, **MIXTURE)
    plain = save(tmp_path / "plain", {f"{name}.weight": back for name, (_, back) in made.items()} | gate, **MIXTURE)
    assert (logits(quantised) - logits(plain)).abs().max() < 1e-4


FUSED = [(awq, AWQ), (fp8_row, FP8), (fp8_tensor, FP8), (fp8_block, FP8_BLOCKS)]


@pytest.mark.parametrize(("make", "quantization"), FUSED)
def test_projections_that_are_stored_together_are_taken_apart(tmp_path, make, quantization):
    """phi3's queries, keys and values, and its gate and up."""
    fused = {"self_attn.qkv_proj": (WIDTH + 2 * WIDTH, WIDTH), "mlp.gate_up_proj": (2 * WIDE, WIDTH)}
    shapes = fused | {name: MATRICES[name] for name in ("self_attn.o_proj", "mlp.down_proj")}
    made = {f"model.layers.0.{name}": make(noise(name, *shape)) for name, shape in shapes.items()}
    opens_alike(tmp_path, made, quantization, model_type="phi3", num_key_value_heads=4)
