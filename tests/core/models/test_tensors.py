"""Every stored tensor is the graph's, or is refused by name."""

from dataclasses import replace

import pytest
import torch

from kernelmux.errors import ModelError
from kernelmux.graph.formats import FORMATS, Weight
from kernelmux.models import build_source
from kernelmux.models.gguf import read
from kernelmux.models.tensors import Tensors


@pytest.fixture(scope="module")
def file(tiny):
    return read(tiny)


def built(file, *added, without=()):
    weights = {name: weight for name, weight in file.weights.items() if name not in without}
    return build_source(replace(file, weights={**weights, **{weight.name: weight for weight in added}}))


def stored(name, *shape, dtype=torch.float32, format="f32"):
    return Weight(name, shape, format, (torch.ones(shape, dtype=dtype),))


@pytest.mark.parametrize(
    "name",
    ["blk.0.attn_q_norm.weight", "blk.0.attn_sinks.weight", "output.bias", "outpuu.weight", "blk.00.ffn_up.bias"],
)
def test_a_tensor_that_the_architecture_has_not_is_refused(file, name):
    with pytest.raises(ModelError, match=f"tensor '{name}': llama models are not built with it; it would be ignored"):
        built(file, stored(name, 64))


def test_a_layer_beyond_those_that_the_metadata_states_is_refused(file):
    with pytest.raises(ModelError, match=r"'blk\.2\.ffn_up\.bias': the metadata states 2 layers, blk\.0 to blk\.1"):
        built(file, stored("blk.2.ffn_up.bias", 96))


def test_a_mutated_name_is_missing_or_refused(file):
    heads = file.weights["token_embd.weight"]
    assert built(file, replace(heads, name="output.weight")).graph.values["output.weight"].shape == heads.shape
    with pytest.raises(ModelError, match=r"'outrut\.weight': llama models are not built with it"):
        built(file, replace(heads, name="outrut.weight"))
    with pytest.raises(ModelError, match=r"'blk\.1\.ffn_up\.weight' is missing; a llama model needs it"):
        built(
            file,
            replace(file.weights["blk.1.ffn_up.weight"], name="blk.1.ffn_uq.weight"),
            without=["blk.1.ffn_up.weight"],
        )


def test_biases_are_added_where_they_are_stored(file):
    graph = built(file, stored("blk.1.attn_q.bias", 64)).graph
    biased = [node.name for node in graph.ops if node.bias]
    assert biased == ["blk.1.attn_q"]


def test_the_rotations_divisors_are_used(file):
    graph = built(file, stored("rope_freqs.weight", 8)).graph
    assert all(node.weight for node in graph.ops if node.op == "rope")


@pytest.mark.parametrize("name", ["output_norm.weight", "token_embd.weight"])
def test_integers_are_no_norm_and_no_table(file, name):
    shape = file.weights[name].shape
    with pytest.raises(ModelError, match=f"'{name}' is stored as i32; .* are read"):
        built(file, stored(name, *shape, dtype=torch.int32, format="i32"))


def test_another_shape_is_refused(file):
    with pytest.raises(ModelError, match=r"'output_norm.weight' is \(65,\), the metadata asks for \(64,\)"):
        built(file, stored("output_norm.weight", 65))


@pytest.mark.parametrize("format", ["f32", "Q8_0", "Q4_K", "fp8_row"])
def test_the_rows_of_a_matrix_are_tensors_of_their_own(file, format):
    shape = (12, 256)
    planes = tuple(
        torch.arange(torch.Size(plane.shape(shape)).numel()).to(torch.uint8) for plane in FORMATS[format].planes
    )
    typed = tuple(
        part.to(getattr(torch, plane.dtype)).view(plane.shape(shape))
        for part, plane in zip(planes, FORMATS[format].planes, strict=True)
    )
    whole = Weight("qkv", shape, format, typed)
    tensors = Tensors(replace(file, weights={"qkv": whole}), "test", 1)
    tensors.split("qkv", 256, {"q": 8, "k": 2, "v": 2})
    parts = [tensors.take(name, rows, 256) for name, rows in (("q", 8), ("k", 2), ("v", 2))]
    for index, plane in enumerate(typed):
        assert torch.cat([part.planes[index].float() for part in parts]).equal(plane.float())
    assert set(tensors.finish().weights) == {"q", "k", "v"}
