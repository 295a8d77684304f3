"""`kernelmux info`: what is told of a file is what it holds, and nothing of it is printed raw."""

from __future__ import annotations

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest

import checkpoints
from command import assert_one_line_error, call_command
from folders import write_tokenizer
from tiny_model import CHAT_TEMPLATE, write_gguf, write_tiny_llama

Q8 = gguf.GGMLQuantizationType.Q8_0


def test_sizes_formats_and_memory_are_the_files(tmp_path):
    path = write_tiny_llama(tmp_path / "m.gguf", weight_type=Q8, layers=3, tied=False)
    tensors = gguf.GGUFReader(path).tensors
    found = json.loads(call_command("info", path, "--json").out)
    vocab = found["tokenizer"]["tokens"]
    assert (found["architecture"], found["name"], found["runs"], found["reason"]) == ("llama", "tiny", True, None)
    assert found["sizes"] == {
        **{"layers": 3, "hidden": 64, "feed_forward": 96, "heads": 4, "kv_heads": 2, "head_dim": 16},
        **{"vocab": vocab, "context": 256, "longest": 256},
    }
    assert found["tokenizer"] == {"model": "gpt2", "pre": "smollm", "tokens": vocab}
    assert found["chat_template"] is True
    assert found["parameters"] == sum(int(np.prod(tensor.shape)) for tensor in tensors)
    assert found["weight_bytes"] == sum(int(tensor.n_bytes) for tensor in tensors)
    q8, f32 = found["weights"]
    assert (q8["format"], q8["tensors"], q8["bits_per_weight"]) == ("Q8_0", 23, 8.5)
    assert (f32["format"], f32["tensors"], f32["parameters"], f32["bytes"]) == ("f32", 7, 448, 1792)
    # Keys and values of two heads of 16 in three layers; fp8_row has a scale of four bytes for each head.
    assert found["cache_bytes_per_token"] == {"bf16": 384, "f16": 384, "f32": 768, "fp8_row": 240}


def test_a_person_reads_the_same(tmp_path):
    result = call_command("info", write_tiny_llama(tmp_path / "m.gguf", weight_type=Q8))
    text, table = result.out.split("\n\n")
    told = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert told["layers"] == "2 of width 64, feed-forward 96"
    assert told["attention"] == "4 heads of 16, keys and values of 2"
    assert told["context"] == "256 tokens"
    assert told["tokenizer"] == "gpt2 (smollm), with a chat template"
    heading, *rows = [line.split("\t") for line in table.splitlines()]
    assert heading == ["format", "tensors", "parameters", "size", "bits/weight"]
    assert [row[:2] for row in rows] == [["Q8_0", "15"], ["f32", "5"]]


def test_what_does_not_run_is_told_of_with_the_reason(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "starcoder", {"general.name": "s"}, {"w": np.zeros((2, 32), np.float32)}, Q8)
    found = json.loads(call_command("info", path, "--json").out)
    assert (found["runs"], found["architecture"], found["parameters"], found["sizes"]) == (False, "starcoder", 64, {})
    assert "unknown architecture 'starcoder'" in found["reason"]
    result = call_command("info", path)
    assert result.code == 0
    assert "does not run" in result.out


def test_strings_of_a_file_cannot_control_a_terminal(tmp_path):
    hostile = "a\x1b[2J\x9b31m\n\u202eb"
    metadata = {"general.name": hostile, "tokenizer.ggml.pre": hostile, "tokenizer.ggml.model": hostile * 50}
    path = write_tiny_llama(tmp_path / "m.gguf", extra=metadata)
    for options in ([], ["--json"]):
        out = call_command("info", path, *options).out
        assert out.replace("\n", "").replace("\t", "").isprintable()


@pytest.mark.parametrize("extra", [{}, {"tokenizer.chat_template": None}])
def test_a_template_is_told_of_not_printed(tmp_path, extra):
    out = call_command("info", write_tiny_llama(tmp_path / "m.gguf", extra=extra)).out
    assert CHAT_TEMPLATE[:20] not in out
    assert ("without a chat template" in out) == bool(extra)


def test_no_file_is_one_line(tmp_path):
    assert_one_line_error(call_command("info", tmp_path / "none.gguf"), "none.gguf: no such file")
    for command in (("info",), ("graph",), ("quantize", "--to", "f32", "-o", tmp_path / "q.gguf")):
        result = call_command(command[0], tmp_path / ("n" * 300), *command[1:])
        assert_one_line_error(result, "the path is too long for the file system")


def test_torch_is_not_imported_for_it(tiny):
    code = f"import sys; sys.argv = ['kernelmux', 'info', {str(tiny)!r}]\n"
    code += "import kernelmux.cli\ntry: kernelmux.cli.main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_what_lies_in_one_matrix_is_counted_once(tmp_path):
    pytest.importorskip("transformers")
    model = checkpoints.make_checkpoint("phi3", tmp_path).model
    found = json.loads(call_command("info", tmp_path, "--json").out)
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["weight_bytes"] == 4 * found["parameters"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_a_folder_is_no_model_by_itself(tmp_path, name):
    (tmp_path / name).write_bytes(b"{      }")
    assert_one_line_error(call_command("info", tmp_path / name), f"it is of a model's folder: name {tmp_path}")


@pytest.mark.parametrize("tokenizer", [True, False])
def test_a_folder_is_told_of_likewise(tmp_path, monkeypatch, tokenizer):
    pytest.importorskip("transformers")
    monkeypatch.setitem(checkpoints.COMMON, "vocab_size", 1000)
    checkpoints.make_checkpoint("qwen2", tmp_path)
    if tokenizer:
        write_tokenizer(tmp_path, "byte level")
    found = json.loads(call_command("info", tmp_path, "--json").out)
    assert (found["runs"], found["architecture"], found["sizes"]["vocab"]) == (True, "qwen2", 1000)
    assert found["tokenizer"]["model"] == ("tokenizer.json" if tokenizer else None)
    assert [each["format"] for each in found["weights"]] == ["f32"]
