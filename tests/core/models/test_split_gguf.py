"""A GGUF file in several parts: any of them opens all, and what is missing or of another model is said."""

from __future__ import annotations

import shutil

import gguf
import pytest
import torch

import kernelmux
from kernelmux.errors import ModelError
from kernelmux.models.gguf import read
from tiny_model import write_tiny_llama


def split(path, count, start="m", folder=None):
    """The model of a file in parts, named and laid out as `llama-gguf-split` does: all metadata is in the first."""
    reader = gguf.GGUFReader(path)
    share = -(-len(reader.tensors) // count)
    parts = []
    for number in range(count):
        part = (folder or path.parent) / f"{start}-{number + 1:05d}-of-{count:05d}.gguf"
        writer = gguf.GGUFWriter(part, "llama")
        if number:
            writer.kv_data[0].pop("general.architecture")
        for key, field in reader.fields.items() if number == 0 else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                kind = field.types[0]
                writer.add_key_value(key, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
        writer.add_uint16("split.count", count)
        writer.add_uint16("split.no", number)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number * share : (number + 1) * share]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parts.append(part)
    return parts


@pytest.fixture
def whole(tmp_path):
    return write_tiny_llama(tmp_path / "whole.gguf", weight_type=gguf.GGMLQuantizationType.Q8_0)


@pytest.fixture
def parts(whole):
    return split(whole, 3)


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_any_part_opens_all(whole, parts, asked):
    one, other = read(whole), read(parts[asked])
    assert other.path == parts[asked]
    assert other.metadata == one.metadata
    assert list(other.weights) == list(one.weights)
    for name, weight in one.weights.items():
        assert weight.planes[0].equal(other.weights[name].planes[0])
    assert len(other.stamp) == 3 * len(one.stamp)


def test_it_runs_as_the_whole_does(whole, parts):
    ids, use = [1, 5, 9], ["*=reference"]
    one, other = kernelmux.load(whole), kernelmux.load(parts[1])
    assert torch.equal(one.forward(ids, one.plan(use=use)), other.forward(ids, other.plan(use=use)))


def test_a_missing_part_is_named(parts):
    parts[1].unlink()
    with pytest.raises(ModelError, match=r"is one of 3 parts, m-00002-of-00003.gguf is missing beside it; fetch it"):
        read(parts[0])
    parts[2].unlink()
    with pytest.raises(ModelError, match=r"m-00002-of-00003\.gguf and 1 more is missing"):
        read(parts[0])


def test_a_part_by_another_name_says_how_it_must_be_named(parts):
    renamed = parts[1].rename(parts[1].with_name("other.gguf"))
    with pytest.raises(ModelError, match=r"is part 2 of 3: name it NAME-00002-of-00003\.gguf, and the others likewise"):
        read(renamed)


def test_parts_that_have_changed_places_are_noticed(parts):
    shutil.copy(parts[2], parts[1])
    with pytest.raises(
        ModelError, match=r"00002-of-00003\.gguf: says that it is part 3 of 3; by its name it is 2 of 3"
    ):
        read(parts[0])


def test_parts_of_two_models_are_noticed(parts, tmp_path):
    (tmp_path / "other").mkdir()
    other = split(write_tiny_llama(tmp_path / "o.gguf", layers=3), 3, folder=tmp_path / "other")
    shutil.copy(other[1], parts[1])
    with pytest.raises(
        ModelError, match=r"00002-of-00003\.gguf: metadata 'split.tensors.count': 29, the first part has 20"
    ):
        read(parts[0])


def test_a_part_without_all_its_tensors_is_noticed(whole, parts, tmp_path):
    lacking = write_tiny_llama(tmp_path / "l.gguf", omit=["output_norm.weight"])
    wrong = split(lacking, 3, folder=tmp_path, start="lacking")
    for part in wrong:
        raw = part.read_bytes()
        at = raw.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
        part.write_bytes(raw[:at] + (20).to_bytes(4, "little") + raw[at + 4 :])
    with pytest.raises(ModelError, match="its 3 parts have 19 tensors of 20; the parts are mixed"):
        read(wrong[0])
