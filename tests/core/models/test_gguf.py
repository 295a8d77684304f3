"""Reading GGUF: what a file holds comes out as it is."""

import gguf
import numpy as np
import pytest
import torch

from counted import work
from kernelmux.graph.formats import FORMATS, gguf_formats
from kernelmux.models.gguf import read
from tiny_model import write_gguf, write_tiny_llama

QUANTISABLE = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]
BLOCK_FORMATS = sorted(fmt.name for fmt in gguf_formats().values() if not fmt.plain)


@pytest.mark.parametrize("name", QUANTISABLE)
def test_values_survive_every_type_that_gguf_writes(tmp_path, name):
    number = gguf.GGMLQuantizationType[name]
    dense = np.random.default_rng(0).standard_normal((3, 5, 512), dtype=np.float32)
    weight = read(write_gguf(tmp_path / "w.gguf", "llama", {}, {"w": dense}, number)).weights["w"]
    assert (weight.name, weight.shape, weight.format) == ("w", (3, 5, 512), gguf_formats()[number].name)
    expected = gguf.dequantize(gguf.quantize(dense, number), number)
    np.testing.assert_array_equal(weight.dequantize().numpy(), expected)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_blocks_come_out_byte_for_byte(tmp_path, name):
    fmt = FORMATS[name]
    blocks = np.random.default_rng(0).integers(0, 256, fmt.planes[0].shape((3, 512)), dtype=np.uint8)
    weight = read(_write_raw(tmp_path / "w.gguf", w=(blocks, fmt.gguf))).weights["w"]
    assert (weight.shape, weight.format) == ((3, 512), name)
    np.testing.assert_array_equal(weight.planes[0].numpy(), blocks)


@pytest.mark.parametrize(("dtype", "name"), [(np.float64, "f64"), (np.int32, "i32"), (np.float16, "f16")])
def test_plain_types_keep_dtype_and_shape(tmp_path, dtype, name):
    values = np.arange(30, dtype=dtype).reshape(2, 3, 5)
    weight = read(_write_raw(tmp_path / "w.gguf", w=(values, None))).weights["w"]
    assert (weight.shape, weight.format, weight.planes[0].dtype) == ((2, 3, 5), name, FORMATS[name].dtype)
    np.testing.assert_array_equal(weight.planes[0].numpy(), values)


def test_bf16_is_a_bfloat16_tensor(tmp_path):
    dense = np.array([[1.0, -2.5, 3.0, 0.0]], dtype=np.float32)
    file = write_gguf(tmp_path / "w.gguf", "llama", {}, {"w": dense}, gguf.GGMLQuantizationType.BF16)
    (plane,) = read(file).weights["w"].planes
    assert plane.dtype == torch.bfloat16
    assert plane.tolist() == dense.tolist()


def test_metadata_is_plain_python(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint8("u8", 200)
    writer.add_int64("i64", -(2**40))
    writer.add_uint64("u64", 2**63)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "naïve 東京")
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("flags", [True, False])
    writer.add_array("words", ["a", "", "東京"])
    metadata = read(_finished(writer, tmp_path / "m.gguf")).metadata
    assert metadata == {
        "general.architecture": "llama",
        "u8": 200,
        "i64": -(2**40),
        "u64": 2**63,
        "f64": 0.1,
        "yes": True,
        "text": "naïve 東京",
        "numbers": [1, -2, 3],
        "flags": [True, False],
        "words": ["a", "", "東京"],
    }
    assert type(metadata["yes"]) is bool
    assert type(metadata["f64"]) is float


@pytest.mark.parametrize("file", ["tiny", pytest.param("smollm2", marks=pytest.mark.model)])
def test_the_gguf_package_reads_the_same(tmp_path, request, file):
    path = write_tiny_llama(tmp_path / "t.gguf", tied=False) if file == "tiny" else request.getfixturevalue(file)
    ours, theirs = read(path), gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert dict(ours.metadata) == fields
    assert list(ours.weights) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(ours.weights[tensor.name].planes[0].numpy(), tensor.data)


def test_writing_to_a_weight_leaves_the_file_alone(tmp_path):
    path = write_tiny_llama(tmp_path / "t.gguf")
    before = path.read_bytes()
    read(path).weights["output_norm.weight"].planes[0].zero_()
    assert path.read_bytes() == before


def test_tensors_outlive_the_model_file(tmp_path):
    path = write_tiny_llama(tmp_path / "t.gguf")
    expected = read(path).weights["output_norm.weight"].planes[0].clone()
    plane = read(path).weights["output_norm.weight"].planes[0]
    assert torch.equal(plane, expected)


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_any_alignment(tmp_path, alignment):
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_custom_alignment(alignment)
    for name in "abc":
        writer.add_tensor(name, np.full(3, ord(name), dtype=np.float32))
    weights = read(_finished(writer, tmp_path / "w.gguf")).weights
    assert {name: weight.planes[0].tolist() for name, weight in weights.items()} == {n: [ord(n)] * 3 for n in "abc"}


@pytest.mark.model
def test_a_vocabulary_takes_no_time(smollm2):
    assert work(read, smollm2) < 15 * 49152, "what reads each number of it by itself makes 80 calls a token"
    file = read(smollm2)
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert file.weights["blk.0.attn_q.weight"].shape == (576, 576)


def test_block_sizes_are_those_of_the_gguf_package():
    sizes = {fmt.gguf: (fmt.block, fmt.nbytes((fmt.block,))) for fmt in FORMATS.values() if fmt.gguf is not None}
    assert sizes == {number: gguf.GGML_QUANT_SIZES[number] for number in sizes}


def _write_raw(path, **tensors):
    writer = gguf.GGUFWriter(path, "llama")
    for name, (array, number) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=None if number is None else gguf.GGMLQuantizationType(number))
    return _finished(writer, path)


def _finished(writer, path):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
