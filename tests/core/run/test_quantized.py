"""A model stored otherwise: what the file holds is what was told, and it is whole or not there."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

import kernelmux
from fake_backend import CPU
from kernelmux.errors import KernelmuxError, ModelError
from kernelmux.models.gguf import read
from kernelmux.models.targets import FORMATS_WRITTEN, parse_rule, targets
from kernelmux.run.quantized import write_quantized
from tiny_model import write_gguf, write_tiny_llama

F16 = gguf.GGMLQuantizationType.F16


def quantise(source, path, format, *rules):
    file = read(source)
    planned = targets(file.weights.values(), format, [*map(parse_rule, rules)])
    return {tensor.name: tensor for tensor in write_quantized(file, path, format, planned, CPU)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return write_tiny_llama(folder / "m.gguf", weight_type=F16, hidden=256, feed_forward=256, tied=False, layers=1)


@pytest.mark.parametrize("format", FORMATS_WRITTEN)
def test_the_file_holds_what_is_told(source, tmp_path, format):
    told = quantise(source, tmp_path / "q.gguf", format, "output.weight=Q8_0")
    before, after = read(source), read(tmp_path / "q.gguf")
    assert list(after.weights) == list(before.weights) == list(told)
    for name, weight in after.weights.items():
        truth = before.weights[name].dequantize()
        error = float((weight.dequantize() - truth).square().sum() / truth.square().sum())
        assert told[name].error == pytest.approx(error, rel=1e-3, abs=1e-12)
        assert (told[name].format, told[name].bytes, told[name].was) == (
            *(weight.format, weight.nbytes, before.weights[name].format),
        )
    assert after.weights["output.weight"].format == "Q8_0"
    assert after.weights["blk.0.attn_q.weight"].format == format
    assert after.weights["blk.0.attn_norm.weight"].format == "f32"


def test_metadata_is_copied_with_its_types(source, tmp_path):
    quantise(source, tmp_path / "q.gguf", "Q5_K")
    before, after = read(source), read(tmp_path / "q.gguf")
    assert after.metadata == {**before.metadata, "general.file_type": 16, "general.quantization_version": 2}
    assert {key: after.kinds[key] for key in before.kinds} == before.kinds


def test_it_answers_nearly_as_before(source, tmp_path):
    quantise(source, tmp_path / "q.gguf", "Q8_0")
    one, other = kernelmux.load(source), kernelmux.load(tmp_path / "q.gguf")
    before, after = (model.forward([1, 2, 3], model.plan(use=["*=reference"])) for model in (one, other))
    assert float((after - before).square().sum() / before.square().sum()) < 1e-3


def test_what_is_stored_so_already_is_copied_to_the_bit(source, tmp_path):
    told = quantise(source, tmp_path / "q.gguf", "f16")
    assert all(tensor.error == 0 for tensor in told.values())
    assert (
        read(tmp_path / "q.gguf")
        .weights["output.weight"]
        .planes[0]
        .equal(read(source).weights["output.weight"].planes[0])
    )


def test_experts_are_stored_one_after_another(tmp_path):
    dense = np.random.default_rng(0).standard_normal((3, 4, 256), dtype=np.float32)
    source = write_gguf(tmp_path / "e.gguf", "llama", {}, {"experts": dense}, F16)
    told = quantise(source, tmp_path / "q.gguf", "Q6_K")
    weight = read(tmp_path / "q.gguf").weights["experts"]
    assert weight.shape == (3, 4, 256)
    assert float((weight.dequantize() - torch.from_numpy(dense)).square().mean()) < 1e-3
    assert 0 < told["experts"].error < 1e-3


@pytest.mark.parametrize(("number", "format"), [(np.inf, "Q4_K"), (np.nan, "Q8_0"), (1e8, "f16"), (1e30, "Q4_0")])
def test_numbers_that_cannot_be_stored_are_an_error_and_nothing_is_left(tmp_path, number, format):
    dense = np.ones((4, 256), dtype=np.float32)
    dense[1, 7] = number
    source = write_gguf(tmp_path / "w.gguf", "llama", {}, {"w": dense})
    with pytest.raises(ModelError, match=f"tensor 'w' has numbers .* larger than {format} holds; store it as f32"):
        quantise(source, tmp_path / "q.gguf", format)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.gguf"]


def test_no_model_is_written_over(source, tmp_path):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(source.read_bytes())
    (tmp_path / "link.gguf").hardlink_to(copy)
    for path in (copy, tmp_path / "link.gguf"):
        with pytest.raises(KernelmuxError, match="is a model, which would be lost"):
            quantise(copy, path, "Q8_0")
    assert copy.read_bytes() == source.read_bytes()


def test_a_model_of_another_pairing_is_not_written_as_if_it_were_ggufs(source, tmp_path):
    file = replace(read(source), pairing="halves")
    with pytest.raises(ModelError, match="queries and keys are not as GGUF has them"):
        list(write_quantized(file, tmp_path / "q.gguf", "Q8_0", targets(file.weights.values(), "Q8_0", []), CPU))
    assert list(tmp_path.iterdir()) == []


def test_whoever_stops_halfway_leaves_nothing(source, tmp_path):
    file = read(source)
    writing = write_quantized(file, tmp_path / "q.gguf", "Q8_0", targets(file.weights.values(), "Q8_0", []), CPU)
    next(writing)
    writing.close()
    assert list(tmp_path.iterdir()) == []


def test_no_more_than_a_tensor_is_held(tmp_path):
    """As Python's memory is traced: torch's is not, but what is written goes through it."""
    weights = {f"w{number}": np.ones((512, 1024), dtype=np.float32) for number in range(8)}
    source = write_gguf(tmp_path / "w.gguf", "llama", {}, weights)
    tracemalloc.start()
    try:
        quantise(source, tmp_path / "q.gguf", "Q8_0")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 3e6
