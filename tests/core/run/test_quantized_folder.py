"""A folder's matrices as FP8: what the new folder holds is what was told, and other libraries' layout; or it is not."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
import kernelmux
from fake_backend import CPU
from folders import write_tokenizer
from kernelmux.errors import KernelmuxError, ModelError
from kernelmux.models.folder import read_folder, stored_folder
from kernelmux.models.fp8_folder import folder_targets
from kernelmux.models.targets import FOLDER_FORMATS, parse_rule
from kernelmux.run.quantized_folder import write_folder
from quantized_folders import (
    EXPERT,
    FP8_BLOCKS,
    GATE,
    GPTQ,
    MIXTURE,
    WIDE,
    WIDTH,
    fp8_block,
    fp8_row,
    fp8_tensor,
    gptq,
    logits,
    matrices,
    noise,
    save,
    shuffled,
)

MAKE = {"fp8_row": fp8_row, "fp8_tensor": fp8_tensor, "fp8_128x128": fp8_block}
SCALES = {"fp8_row": "weight_scale", "fp8_tensor": "weight_scale", "fp8_128x128": "weight_scale_inv"}


def quantise(source, path, format, *rules):
    stored = stored_folder(source)
    planned = folder_targets(stored, format, [parse_rule(rule, format) for rule in rules])
    return {tensor.name: tensor for tensor in write_folder(stored, path, format, planned, CPU)}


@pytest.fixture
def source(tmp_path):
    return save(tmp_path / "source", {f"{name}.weight": numbers for name, numbers in matrices().items()})


@pytest.mark.parametrize("format", FOLDER_FORMATS)
def test_the_folder_holds_what_is_told(source, tmp_path, format):
    told = quantise(source, tmp_path / "made", format)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "made" / "model.safetensors")
    for name, numbers in matrices().items():
        parts, back = MAKE[format](numbers)
        assert after.pop(f"{name}.weight").float().equal(parts["weight"].float())
        scale = after.pop(f"{name}.{SCALES[format]}")
        assert scale.view(-1).equal(parts[SCALES[format]].view(-1))
        assert scale.shape == ((1,) if format == "fp8_tensor" else parts[SCALES[format]].shape)
        error = float((back - numbers).square().sum() / numbers.square().sum())
        tensor = told[f"{name}.weight"]
        assert tensor.error == pytest.approx(error, rel=1e-3)
        assert tensor.bytes == numbers.numel() + scale.nbytes
    for name, numbers in after.items():
        assert numbers.equal(before[name])
        assert told[name].error == 0
    graph = kernelmux.load(tmp_path / "made").graph
    assert graph.values["blk.0.ffn_down.weight"].format == format
    assert graph.values["token_embd.weight"].format == "f32"


@pytest.mark.parametrize("format", FOLDER_FORMATS)
def test_it_answers_nearly_as_before(source, tmp_path, format):
    quantise(source, tmp_path / "made", format)
    before, after = logits(source), logits(tmp_path / "made")
    assert 0 < float((after - before).square().sum() / before.square().sum()) < 1e-2


def test_config_and_what_lies_beside_it_are_copied(source, tmp_path):
    write_tokenizer(source, "byte level")
    (source / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    (source / "README.md").write_text("of the source", "utf-8")
    quantise(source, tmp_path / "made", "fp8_row")
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "made", source))
    said = ours.pop("quantization_config")
    assert ours == theirs
    assert (said["quant_method"], said["format"], said["ignore"]) == (
        "compressed-tensors",
        "float-quantized",
        ["lm_head"],
    )
    assert said["config_groups"]["group_0"]["weights"]["strategy"] == "channel"
    assert {path.name for path in (tmp_path / "made").iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
        "chat_template.jinja",
    }
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "made" / name).read_bytes() == (source / name).read_bytes()


def test_rules_leave_some_as_they_are_and_config_names_them(source, tmp_path):
    told = quantise(source, tmp_path / "made", "fp8_128x128", "*.mlp.gate_proj.weight=bf16", "*.v_proj.weight=f32")
    assert told[f"{GATE}.weight"].format == "bf16"
    said = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert said["modules_to_not_convert"] == ["lm_head", GATE, "model.layers.0.self_attn.v_proj"]
    assert said["weight_block_size"] == [128, 128]
    formats = kernelmux.load(tmp_path / "made").graph.values
    assert [formats[f"blk.0.{name}.weight"].format for name in ("ffn_gate", "attn_v", "attn_q")] == [
        *("bf16", "f32", "fp8_128x128"),
    ]


def test_a_head_is_fp8_where_a_rule_says_so(source, tmp_path):
    tensors = load_file(source / "model.safetensors") | {"lm_head.weight": noise("head", 40, WIDTH)}
    untied = save(tmp_path / "untied", tensors, tie_word_embeddings=False)
    for rules, formats, apart in (((), "f32", ["lm_head"]), (("lm_head.weight=fp8_row",), "fp8_row", [])):
        quantise(untied, tmp_path / formats, "fp8_row", *rules)
        assert kernelmux.load(tmp_path / formats).graph.values["output.weight"].format == formats
        said = json.loads((tmp_path / formats / "config.json").read_text())["quantization_config"]
        assert said["ignore"] == apart
        assert logits(tmp_path / formats).isfinite().all()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["blk.*=bf16"], "no tensor matches"),
        (["*.input_layernorm.weight=bf16"], "of all that it matches tensors that are no matrices of layers stay"),
        (["model.embed_tokens.weight=fp8_row"], "of all that it matches tensors that are no matrices of layers stay"),
        (["*.q_proj.weight=Q8_0"], "Q8_0 is read, and not written in such a file; known: fp8_row, f32"),
        (["*.q_proj.weight=fp8_tensor"], "fp8_tensor is read, and not written in such a file"),
    ],
)
def test_rules_that_say_nothing_are_refused(source, tmp_path, rules, message):
    with pytest.raises(ModelError, match=message):
        quantise(source, tmp_path / "made", "fp8_row", *rules)
    assert not (tmp_path / "made").exists()


def test_rows_that_do_not_divide_stay_what_they_are(tmp_path):
    shapes = {"mlp.gate_proj": (96, WIDTH), "mlp.up_proj": (96, WIDTH), "mlp.down_proj": (WIDTH, 96)}
    numbers = {f"model.layers.0.{name}": noise(name, *shape) for name, shape in shapes.items()}
    narrow = {f"{name}.weight": part for name, part in (matrices() | numbers).items()}
    folder = save(tmp_path / "narrow", narrow, intermediate_size=96)
    told = quantise(folder, tmp_path / "made", "fp8_128x128")
    down = told["model.layers.0.mlp.down_proj.weight"]
    assert (down.format, down.reason) == ("f32", "fp8_128x128 stores rows in blocks of 128, 96 columns do not divide")
    assert logits(tmp_path / "made").isfinite().all()


def test_experts_are_fp8_and_their_router_is_not(tmp_path):
    moe = "model.layers.0.block_sparse_moe"
    tensors = {f"{name}.weight": numbers for name, numbers in matrices().items() if "mlp" not in name}
    tensors |= {
        f"{moe}.experts.{number}.{name}.weight": noise(f"{name}{number}" * 3, *shape)
        for number in range(2)
        for name, shape in EXPERT.items()
    }
    source = save(tmp_path / "source", tensors | {f"{moe}.gate.weight": noise("gate", 2, WIDTH)}, **MIXTURE)
    told = quantise(source, tmp_path / "made", "fp8_row")
    assert told[f"{moe}.gate.weight"].reason == "routers stay what they are"
    assert kernelmux.load(tmp_path / "made").graph.values["blk.0.ffn_up_exps.weight"].format == "fp8_row"
    said = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert said["ignore"] == ["lm_head", f"{moe}.gate"]


@pytest.mark.parametrize("make", [gptq, shuffled(gptq), fp8_block])
def test_folders_that_are_quantised_otherwise_are_read(tmp_path, make):
    made = {name: make(numbers) for name, numbers in matrices().items()}
    stored = {f"{name}.{end}": part for name, (parts, _) in made.items() for end, part in parts.items()}
    source = save(tmp_path / "source", stored, FP8_BLOCKS if make is fp8_block else GPTQ)
    quantise(source, tmp_path / "made", "fp8_row")
    weight = read_folder(tmp_path / "made").weights["blk.0.ffn_gate.weight"]
    assert weight.dequantize().equal(fp8_row(made[GATE][1])[1])


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_numbers_that_cannot_be_stored_are_an_error_and_nothing_is_left(tmp_path, number):
    tensors = {f"{name}.weight": numbers for name, numbers in matrices().items()}
    tensors[f"{GATE}.weight"][3, 5] = number
    source = save(tmp_path / "source", tensors)
    with pytest.raises(ModelError, match="has numbers that are infinite or NaN"):
        quantise(source, tmp_path / "made", "fp8_row")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nothing_is_written_over(source, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    quantise(source, made, "fp8_row")
    before = (made / "model.safetensors").read_bytes()
    for path in (made, source):
        with pytest.raises(KernelmuxError, match="is there already: name a new folder to write"):
            quantise(source, path, "fp8_tensor")
    assert (made / "model.safetensors").read_bytes() == before


def test_fused_projections_of_which_blocks_reach_over_a_part_are_not_left(tmp_path):
    """phi3's rows of q, k and v are taken apart where they are no multiple of 128."""
    fused = {"self_attn.qkv_proj": (2 * WIDTH, WIDTH), "mlp.gate_up_proj": (2 * WIDE, WIDTH)}
    fused |= {"self_attn.o_proj": (WIDTH, WIDTH), "mlp.down_proj": (WIDTH, WIDE)}
    stored = {f"model.layers.0.{name}.weight": noise(name, *shape) for name, shape in fused.items()}
    source = save(tmp_path / "source", stored, model_type="phi3")
    with pytest.raises(ModelError, match=r"its blocks of fp8_128x128 reach over .*leave that one as it is \(--rule"):
        quantise(source, tmp_path / "made", "fp8_128x128")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    quantise(source, tmp_path / "made", "fp8_128x128", "*qkv_proj*=bf16")
    assert logits(tmp_path / "made").isfinite().all()


def test_of_a_model_of_images_the_text_is_written(tmp_path):
    pytest.importorskip("transformers")
    checkpoints.make_checkpoint("llama4", tmp_path / "text")
    whole = tmp_path / "whole"
    whole.mkdir()
    config = {"model_type": "llama4", "text_config": json.loads((tmp_path / "text" / "config.json").read_text())}
    (whole / "config.json").write_text(json.dumps(config), "utf-8")
    tensors = {f"language_model.{name}": part for name, part in load_file(tmp_path / "text/model.safetensors").items()}
    save_file(tensors | {"vision_model.class_embedding": torch.zeros(8)}, whole / "model.safetensors")
    told = quantise(whole, tmp_path / "made", "fp8_row")
    assert told["model.layers.0.feed_forward.shared_expert.up_proj.weight"].format == "fp8_row"
    assert told["model.layers.0.feed_forward.experts.down_proj"].format == "f32"
    assert logits(tmp_path / "made").isfinite().all()


@pytest.mark.parametrize("format", FOLDER_FORMATS)
def test_transformers_reads_it_as_the_same_model(tmp_path, format):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate" if format == "fp8_128x128" else "compressed_tensors")
    source, made = tmp_path / "source", tmp_path / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(checkpoints.COMMON, "hidden_size", 128)
        patch.setitem(checkpoints.COMMON, "intermediate_size", 256)
        checkpoints.make_checkpoint("llama", source)
    quantise(source, made, format)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    with torch.no_grad():
        truth = theirs(torch.tensor([checkpoints.IDS])).logits[0]
    model = kernelmux.load(made)
    assert (model.forward(checkpoints.IDS, model.plan(use=["*=reference"])) - truth).abs().max() < 1e-4
