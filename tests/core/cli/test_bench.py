"""`kernelmux bench`: tables on stdout, the document in a file, and errors in one line."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import gguf
import pytest

from command import assert_one_line_error, call_command
from kernelmux.contract.cpu import Cpu
from kernelmux.measure.ceilings import Ceilings
from tiny_model import write_tiny_llama

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch):
    ceilings = Ceilings(1e10, 1e10, {"bf16": 1e11, "f32": 1e11})
    monkeypatch.setattr("kernelmux.measure.ceilings.measure_ceilings", lambda device: ceilings)
    monkeypatch.setattr(Cpu, "past_cache", 2**16)


def test_ops_lists_every_kernel_beside_its_peers(tmp_path: Path):
    result = call_command(
        *("bench", "ops", "--shape", "tiny:Q4_0", "--op", "rms_norm", "--op", "add", "--m", "1,3"),
        *("--save", tmp_path / "ops.json"),
    )
    assert result.code == 0
    lines = [line.split("\t") for line in result.out.splitlines()]
    assert lines[0][:4] == ["op", "work", "m", "kernel"]
    assert {(row[0], row[2]) for row in lines[1:]} == {(op, m) for op in ("rms_norm", "add") for m in "13"}
    assert {"torch:f32", "reference:f64"} <= {row[3] for row in lines[1:]}
    assert "Ceilings: copy 10 GB/s" in result.err
    document = json.loads((tmp_path / "ops.json").read_text())
    assert len(document["rows"]) == len(lines) - 1
    assert all(row["us"] > 0 for row in document["rows"])


def test_ops_takes_a_bare_matrix_and_one_kernel():
    result = call_command("bench", "ops", "--shape", "32x64:Q4_0", "--kernel", "torch:int4", "--m", 2)
    assert result.code == 0
    (_, row) = result.out.splitlines()
    assert row.startswith("mul_mat\t32x64 Q4_0\t2\ttorch:int4\tbf16")


def test_ops_says_who_declines_and_why():
    result = call_command("bench", "ops", "--shape", "32x256:Q4_K", "--kernel", "torch")
    assert "torch:int4 does not take 32x256 Q4_K: it takes weights in Q4_0 and Q4_1" in result.err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--shape", "lama-8b:bf16"), "--shape lama-8b:bf16: unknown shape 'lama-8b' (did you mean 'llama-8b'"),
        (("--shape", "llama-8b:Q4_KM"), "--shape llama-8b:Q4_KM: unknown format 'Q4_KM' (did you mean 'Q4_K_M'"),
        (("--shape", "32x64:Q4_9"), "did you mean"),
        (("--shape", "32x64:f32", "--op", "add"), "is a mul_mat's"),
        (("--shape", "tiny:f32", "--op", "mulmat"), "did you mean 'mul_mat'"),
        (("--shape", "32x64:f32", "--kernel", "torhc:f32"), "did you mean 'torch:f32'"),
        (("--m", "1,x"), "as 1,16,512"),
        (("--m", "0"), "as 1,16,512"),
        (("--device", "gpu"), "known: cpu, cuda"),
    ],
)
def test_ops_says_what_was_wrong(arguments: tuple[str, ...], hint: str):
    assert_one_line_error(call_command("bench", "ops", *arguments), hint)


@pytest.mark.slow
def test_model_gives_rates_and_memory(tmp_path: Path):
    path = tmp_path / "model.json"
    result = call_command(
        *("bench", "model", "--random", "tiny:Q4_0", "--prompt", 20, "--context", 10, "--batch", 2, "--decode", 3),
        *("--save", path),
    )
    assert result.code == 0
    assert [line.split("\t")[0] for line in result.out.splitlines()[1:]] == [
        "prompt of 20",
        "decode at 2 x 10",
    ]
    assert "Memory: weights" in result.err
    assert json.loads(path.read_text())["title"] == "random tiny Q4_0"


@pytest.mark.slow
def test_model_times_drawn_tokens_and_says_how_they_were_drawn(tiny: Path):
    arguments = ("bench", "model", tiny, "--prompt", 4, "--context", 4, "--decode", 2)
    result = call_command(*arguments, "--temperature", 0.7, "--top-p", 0.9)
    assert "decode at 1 x 4, temperature 0.7, top_p 0.9" in result.out
    assert_one_line_error(call_command(*arguments, "--temperature", 0.7, "--top-p", 0), "top_p=0.0", "top_p above 0")


def test_a_result_is_what_the_performance_page_reads(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "results").mkdir()
    arguments = ("bench", "model", tiny, "--prompt", 4, "--context", 4, "--decode", 2)
    assert call_command(*arguments, "--save", tmp_path / "results" / "tiny.json").code == 0
    # The page's script, and those beside it that it imports.
    monkeypatch.syspath_prepend(str(DOCS))
    for name in ("performance", "choices", "scatter", "tables"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    render = importlib.import_module("performance").render
    assert "| prompt of 4 | tokens/s |" in render(tmp_path / "results")["performance.md"]


def test_model_refuses_more_tokens_than_the_model_holds(tiny: Path):
    result = call_command("bench", "model", tiny, "--prompt", 1000)
    assert_one_line_error(result, "1000 tokens", "holds 256")


def test_model_takes_packed_weights_from_disk(tmp_path: Path):
    path = write_tiny_llama(tmp_path / "tiny.gguf", weight_type=gguf.GGMLQuantizationType.Q4_0)
    asked = ("bench", "model", path, "--prompt", 5, "--context", 5, "--decode", 3, "--cache-packed")
    first, second = (call_command(*asked).err for _ in range(2))
    assert "weights from the cache on disk 0 B" in first
    assert re.search(r"weights from the cache on disk [\d.]+ [kM]?B", second)
    assert "weights from the cache on disk 0 B" not in second
    random = call_command(*("bench", "model", "--random", "tiny:Q4_0"), *asked[3:])
    assert "random:tiny:Q4_0 is no file" in random.err
