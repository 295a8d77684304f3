"""`kernelmux quantize`: the file, the table, and mistakes in one line."""

from __future__ import annotations

import json

import pytest

from command import assert_one_line_error, call_command
from kernelmux.models.gguf import read
from quantized_folders import matrices, save
from tiny_model import write_tiny_llama


@pytest.fixture
def model(tmp_path):
    return write_tiny_llama(tmp_path / "m.gguf")


def test_the_table_and_the_file(model, tmp_path):
    result = call_command(
        "quantize", model, "--to", "q4_0", "--rule", "*.ffn_down.weight=Q8_0", "-o", tmp_path / "q.gguf"
    )
    assert result.code == 0
    table, _, rest = result.out.partition("\n\n")
    heading, *rows = [line.split("\t") for line in table.splitlines()]
    assert heading == ["tensor", "was", "is", "size", "NMSE"]
    formats = {name: (was, now) for name, was, now, _, _ in rows}
    assert formats["token_embd.weight"] == ("f32", "Q4_0")
    assert formats["blk.0..1.ffn_down.weight"] == ("f32", "Q8_0")
    assert formats["blk.0..1.attn_norm.weight"] == ("f32", "f32")
    assert "5 of 20 tensors: vectors are f32" in rest
    assert read(tmp_path / "q.gguf").weights["blk.1.ffn_down.weight"].format == "Q8_0"
    answer = call_command("run", tmp_path / "q.gguf", "-p", "hello", "--max-tokens", 2, "--use", "*=reference")
    assert answer.code == 0


def test_json_has_every_tensor(model, tmp_path):
    result = call_command("quantize", model, "--to", "Q8_0", "-o", tmp_path / "q.gguf", "--json")
    found = json.loads(result.out)
    weights = read(tmp_path / "q.gguf").weights
    assert [tensor["name"] for tensor in found["tensors"]] == list(weights)
    assert found["bytes"] == sum(weight.nbytes for weight in weights.values())
    assert all(0 < tensor["error"] < 1e-4 for tensor in found["tensors"] if tensor["format"] == "Q8_0")


def test_fp8_is_a_folder_of_a_folder(tmp_path, model):
    source, made = tmp_path / "source", tmp_path / "made"
    save(source, {f"{name}.weight": numbers for name, numbers in matrices().items()})
    result = call_command("quantize", source, "--to", "FP8_ROW", "--rule", "*.v_proj.weight=bf16", "-o", made)
    assert result.code == 0, result.err
    table, _, rest = result.out.partition("\n\n")
    rows = {name: cells for name, *cells in (line.split("\t") for line in table.splitlines())}
    assert rows["model.layers.0.mlp.down_proj.weight"][:2] == ["f32", "fp8_row"]
    assert float(rows["model.layers.0.mlp.down_proj.weight"][3]) < 2e-3
    assert rows["model.layers.0.self_attn.v_proj.weight"][1] == "bf16"
    assert "4 of 11 tensors: tensors that are no matrices of layers stay what they are" in rest
    found = json.loads(call_command("info", made, "--json").out)
    assert {each["format"] for each in found["weights"]} == {"f32", "bf16", "fp8_row"}
    for arguments, hint in (
        ((model, "--to", "fp8_row", "-o", tmp_path / "of_gguf"), "name the model's own, or --to Q8_0 for a GGUF file"),
        ((source, "--to", "fp8_row", "-o", tmp_path / "a.gguf"), "GGUF has no type for fp8_row, which is written as a"),
        ((source, "--to", "fp8_row", "-o", made), "is there already: name a new folder to write"),
        ((source, "--to", "Q8_0", "--rule", "*=fp8_row", "-o", tmp_path / "a.gguf"), "and not written in such a file"),
    ):
        assert_one_line_error(call_command("quantize", *arguments), hint)
    assert {path.name for path in tmp_path.iterdir()} == {"m.gguf", "source", "made"}


def test_mistakes_are_one_line(model, tmp_path):
    out = tmp_path / "q.gguf"
    for arguments, hint in (
        (("--to", "Q9", "-o", out), "--to: unknown format 'Q9'"),
        (("--to", "Q8_0", "--rule", "x", "-o", out), "a rule is PATTERN=FORMAT"),
        (("--to", "Q8_0", "--rule", "x*=Q8_0", "-o", out), "no tensor matches"),
        (("--to", "Q8_0", "-o", tmp_path / "none" / "q.gguf"), "there is no folder"),
    ):
        assert_one_line_error(call_command("quantize", model, *arguments), hint)
    result = call_command("quantize", model, "--to", "Q8_0", "-o", model)
    assert result.code == 2
    assert "name another file" in " ".join(result.err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
