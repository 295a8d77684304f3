"""An architecture that a distribution brings: the one of docs/adding-an-architecture.md, found by its entry point."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kernelmux
from kernelmux.errors import ModelError
from kernelmux.models import build_source
from kernelmux.models.gguf import read
from tiny_model import write_tiny_llama

PAGE = Path(__file__).parents[4] / "docs" / "adding-an-architecture.md"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs a module as a distribution that brings an architecture."""

    def install(code, target="acme_parallel:PARALLEL"):
        site = tmp_path / "site"
        described = site / "acme_parallel-1.0.dist-info"
        described.mkdir(parents=True)
        (site / "acme_parallel.py").write_text(code, "utf-8")
        (described / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-parallel\nVersion: 1.0\n", "utf-8")
        (described / "entry_points.txt").write_text(f"[kernelmux.architectures]\nparallel = {target}\n", "utf-8")
        monkeypatch.syspath_prepend(site)

    yield install
    sys.modules.pop("acme_parallel", None)


@pytest.fixture
def page_code():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    return code


@pytest.fixture
def file(tmp_path):
    norms = [f"blk.{layer}.ffn_norm.weight" for layer in range(2)]
    return write_tiny_llama(tmp_path / "parallel.gguf", architecture="parallel", omit=norms)


def test_it_is_opened_as_any_other(installed, page_code, file):
    installed(page_code)
    model = kernelmux.load(file)
    (norm,) = (node for node in model.graph.ops if node.name == "blk.0.attn_norm")
    read = [node.name for node in model.graph.ops if norm.outputs[0] in node.inputs]
    assert read == [f"blk.0.{part}" for part in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")]
    exact = model.forward([1, 2, 3], model.plan(use=["*=reference"]))
    assert torch.allclose(model.forward([1, 2, 3], model.plan()), exact, atol=1e-4)


def test_its_folders_too(installed, page_code, tmp_path, file):
    """The names and keys of its own are those that the page states."""
    installed(page_code)
    safetensors = pytest.importorskip("safetensors.torch")
    weights = {name: weight.dequantize().clone() for name, weight in read(file).weights.items()}
    renamed = {_module(name): values for name, values in weights.items()}
    safetensors.save_file(renamed, tmp_path / "model.safetensors")
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 256}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(weights["token_embd.weight"])}
    config = {**sizes, "model_type": "acme_parallel", "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps({**config, "local_window": 3}), "utf-8")
    model = kernelmux.load(tmp_path)
    assert {node.window for node in model.graph.ops if node.op == "attention"} == {3}
    metadata = {**read(file).metadata, "parallel.attention.sliding_window": 3}
    same = kernelmux.Model(build_source(replace(read(file), metadata=metadata)))
    found, wanted = (each.forward([1, 2, 3, 4, 5], each.plan(use=["*=reference"])) for each in (model, same))
    assert torch.allclose(found, wanted, atol=1e-5)


def _module(name):
    """What the folder calls a tensor."""
    outside = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    stem = name.removesuffix(".weight")
    if stem in outside:
        return f"{outside[stem]}.weight"
    _, layer, part = stem.split(".")
    inside = {"attn_norm": "norm", "attn_output": "self_attn.o_proj"}
    inside |= {f"attn_{each}": f"self_attn.{each}_proj" for each in "qkv"}
    inside |= {f"ffn_{each}": f"mlp.{each}_proj" for each in ("gate", "up", "down")}
    return f"model.layers.{layer}.{inside[part]}.weight"


FAULTS = {
    "raises when imported": ("1 / 0", r"architecture 'parallel' of acme-parallel cannot be loaded: ZeroDivisionError"),
    "is none": ("PARALLEL = 3", "architecture 'parallel' of acme-parallel is a int; an Architecture is needed"),
    "raises": (
        "from kernelmux.models.architecture import Architecture\nPARALLEL = Architecture(lambda t: t.nothing)",
        r"architecture 'parallel': AttributeError at .*acme_parallel.py:2",
    ),
}


@pytest.mark.parametrize(("code", "message"), FAULTS.values(), ids=FAULTS)
def test_a_broken_one_is_told_in_one_line(installed, file, code, message):
    installed(code)
    with pytest.raises(ModelError, match=message) as caught:
        kernelmux.load(file)
    assert "\n" not in str(caught.value)


def test_without_it_the_names_that_exist_are_told(file):
    with pytest.raises(ModelError, match=r"unknown architecture 'parallel'; known: gemma, .*, smollm3"):
        kernelmux.load(file)
