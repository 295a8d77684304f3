"""A folder written as GGUF computes and reads text as the folder does; what GGUF has no words for is refused."""

from __future__ import annotations

import json

import pytest

import checkpoints
from fake_backend import CPU
from folders import write_tokenizer
from kernelmux.errors import ModelError
from kernelmux.models import open_model
from kernelmux.models.exported import exported
from kernelmux.models.gguf import read
from kernelmux.models.targets import targets
from kernelmux.models.tokenizer import Tokenizer
from kernelmux.run.model import Model
from kernelmux.run.quantized import write_quantized
from texts import texts

ARCHITECTURES = ("llama3", "llama-biased-untied", "qwen2", "gemma3", "phi3", "smollm3", "granite")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setitem(checkpoints.COMMON, "vocab_size", 1000)

    def make(name, kind="byte level"):
        checkpoints.make_checkpoint(name, tmp_path / "folder")
        return write_tokenizer(tmp_path / "folder", kind)

    return make


def written(folder, path, format="f32"):
    file = exported(folder)
    for _ in write_quantized(file, path, format, targets(file.weights.values(), format, []), CPU):
        pass
    return open_model(path)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_ids_are_those_of_the_folder(folder, tmp_path, name):
    path = folder(name)
    before, after = open_model(path), written(path, tmp_path / "m.gguf")
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    one, other = (Model(source) for source in (before, after))
    logits = [model.forward(ids, model.plan(use=["*=reference"])) for model in (one, other)]
    assert float((logits[1] - logits[0]).abs().max()) < 2e-5 * float(logits[0].abs().max())
    theirs, ours = Tokenizer.from_folder(path), after.tokenizer
    for text in texts(100, seed=9):
        assert ours.encode(text) == theirs.encode(text)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id, theirs.eos_id)
    assert ours.end_ids >= {theirs.eos_id}
    assert after.file.kinds[f"{after.file.metadata['general.architecture']}.attention.layer_norm_rms_epsilon"] == (6,)


def test_a_file_stays_as_it_is(tiny):
    file, same = read(tiny), exported(tiny)
    assert (same.metadata, same.kinds) == (file.metadata, file.kinds)
    assert list(same.weights) == list(file.weights)


@pytest.mark.parametrize("kind", ["gemma", "unigram"])
def test_other_tokenizers_are_refused(folder, kind):
    with pytest.raises(ModelError, match="no byte-level BPE, and only those are written"):
        exported(folder("qwen2", kind))


def test_a_split_without_a_name_is_refused(folder):
    path = folder("qwen2")
    data = json.loads((path / "tokenizer.json").read_text("utf-8"))
    data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (path / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    with pytest.raises(ModelError, match="splits text in a way that has no name in GGUF files"):
        exported(path)
