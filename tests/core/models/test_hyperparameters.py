"""Every key of an architecture is read, known not to matter, or refused by name."""

from dataclasses import replace

import pytest

from kernelmux.errors import ModelError
from kernelmux.models import build_source
from kernelmux.models.gguf import read


@pytest.fixture(scope="module")
def file(tiny):
    return read(tiny)


def built(file, **keys):
    """The source of the tiny llama with these keys, `__` for a dot; None leaves one out."""
    named = {f"llama.{key.replace('__', '.')}": value for key, value in keys.items()}
    metadata = {key: value for key, value in {**file.metadata, **named}.items() if value is not None}
    return build_source(replace(file, metadata=metadata))


REFUSED = {
    "attention__causal": (False, "llama.attention.causal = False: only True is built in"),
    "attention__clamp_kqv": (8.0, "llama.attention.clamp_kqv = 8.0: only 0.0 is built in"),
    "attention__shared_kv_layers": (1, "llama.attention.shared_kv_layers = 1: llama models are not built with this"),
    "expert_count": (8, "lacks llama.expert_used_count, which a llama model must state"),
    "block_count": ("2", "llama.block_count = '2': a count from 1 on is needed"),
    "block_count ": (10**6, "llama.block_count = 1000000: up to 4096 layers are built"),
    "embedding_length": (None, "lacks llama.embedding_length, which a llama model must state"),
    "feed_forward_length": ([96, 64], "layers of different sizes are not built in"),
    "attention__head_count": ([4], "1 values for 2 layers"),
    "attention__head_count_kv": (3, "4 query heads do not divide over 3 kv heads"),
    "attention__value_length": (8, "keys have 16 elements, values 8; values of another size are not built in"),
    "attention__layer_norm_rms_epsilon": (0.0, "a positive number is needed"),
    "rope__freq_base": (True, "llama.rope.freq_base = True: a positive number is needed"),
    "rope__freq_base ": (1.0, "a number above 1 is needed"),
    "rope__dimension_count": (18, "an even count up to the head's 16 is needed"),
    "rope__dimension_sections": ([4, 4], "llama models are not built with this key"),
    "rope__scaling__type": ("yarm", r"it is not built in \(did you mean 'yarn'\?\)"),
    "context_length": (2**40, "a count up to 2147483647 is needed"),
}


@pytest.mark.parametrize(("key", "value", "message"), [(key, *rest) for key, rest in REFUSED.items()], ids=REFUSED)
def test_what_is_not_built_in_is_refused_by_name(file, key, value, message):
    with pytest.raises(ModelError, match=message) as caught:
        built(file, **{key.strip(): value})
    assert "\n" not in str(caught.value)
    assert str(file.path) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention__causal", True),
        ("expert_count", 0),
        ("rope__scaling__finetuned", True),
        ("tensor_data_layout", "Meta AI original pth"),
        ("feed_forward_length", [96, 96]),
        ("attention__head_count_kv", [2, 2]),
        ("rope__scaling__type", "none"),
        ("rope__scaling__factor", 0.0),
    ],
)
def test_keys_that_change_nothing_give_the_same_graph(file, key, value):
    assert built(file, **{key: value}).graph == built(file).graph


def rotation(file, **keys):
    return next(node.rotation for node in built(file, **keys).graph.ops if node.op == "rope")


def test_scaling_is_read_as_llama_cpp_reads_it(file):
    plain = rotation(file)
    assert (plain.scaling, plain.magnitude) == ("none", 1.0)
    assert rotation(file, rope__scaling__factor=4.0).scaling == "linear"
    assert rotation(file, rope__scale_linear=4.0).factor == 4.0
    stated = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    yarn = rotation(file, **stated, rope__scaling__original_context_length=64)
    assert (yarn.scaling, yarn.factor, yarn.original_context) == ("yarn", 4.0, 64)
    assert rotation(file, **stated, rope__scaling__yarn_beta_fast=16.0).beta_fast == 16.0
    assert rotation(file, **stated, rope__scaling__attn_factor=0.5).magnitude == pytest.approx(yarn.magnitude / 2)


def test_a_window_reaches_every_layers_attention(file):
    nodes = [node for node in built(file, attention__sliding_window=7).graph.ops if node.op == "attention"]
    assert [node.window for node in nodes] == [7, 7]


def test_an_architecture_that_is_none_is_told_the_nearest(file):
    for name, message in (("lama", r"unknown architecture 'lama' \(did you mean 'llama'\?\)"), (7, "is 7; the name")):
        with pytest.raises(ModelError, match=message):
            build_source(replace(file, metadata={**file.metadata, "general.architecture": name}))
