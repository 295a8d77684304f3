"""Files with one thing wrong: each is refused in one line, or is opened as what it says; never wrongly in silence.

What it says is what the gguf package reads. Opened, a file whose keys differ from the good one's, but for those that
say nothing of how it computes, makes another graph, other sizes or another tokenizer.
"""

from __future__ import annotations

import json
import time

import gguf
import numpy as np
import pytest

from kernelmux.errors import KernelmuxError
from kernelmux.models import Source, open_model
from mutated_gguf import Mutants
from tiny_model import MERGES, write_three_llamas

SEEDS = 300
SLOW_SEEDS = 5000
SAYS_NOTHING = ("token_type", "scores", "padding_token_id", "pre", "vocab_size")
"""Ends of keys whose value changes nothing here: the tokens are what the vocabulary's size is taken from, and with so
few merges texts are split alike however they are."""
WORDS = [merge.replace(" ", "").replace("Ġ", " ") for merge in MERGES]


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    """Of a file in float32, one in blocks with a head of its own, and one whose positions are scaled."""
    paths = write_three_llamas(tmp_path_factory.mktemp("mutants"), turned=8)
    return [(Mutants(path), open_model(path)) for path in paths.values()]


def computes(source: Source) -> list[object]:
    """All that decides what a model answers, but for its weights' numbers."""
    tokenizer = source.tokenizer
    vocabulary = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    ends = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, sorted(tokenizer.end_ids))
    graph = json.loads(source.graph.to_json())["nodes"]
    texts = [tokenizer.encode(text) for text in WORDS]
    template = source.file.metadata.get("tokenizer.chat_template")
    return [graph, source.shape, vocabulary, texts, ends, template]


def stated(source: Source) -> dict[str, object]:
    """The keys that say something of how a file computes."""
    ours = ("llama.", "tokenizer.")
    found = {k: v for k, v in source.file.metadata.items() if k.startswith(ours) and not k.endswith(SAYS_NOTHING)}
    # A merge that is there twice is one.
    return found | {"tokenizer.ggml.merges": list(dict.fromkeys(found["tokenizer.ggml.merges"]))}


def check(mutants, seed, folder):
    make, good = mutants[seed % len(mutants)]
    mutant = make(seed)
    path = folder / "mutant.gguf"
    path.write_bytes(mutant.data)
    began = time.process_time()
    try:
        opened = open_model(path)
        found = computes(opened)
    except KernelmuxError as error:
        refusal = str(error)
        assert refusal.isprintable(), f"seed {seed}, {mutant.told}"
        assert len(refusal) < 2000, f"seed {seed}, {mutant.told}"
        return "refused"
    except Exception as error:
        raise AssertionError(f"seed {seed}, {mutant.told}: {error!r}") from error
    finally:
        assert time.process_time() - began < 2, f"seed {seed}, {mutant.told}"
    before, matters = (stated(source) for source in (good, opened))
    if repr(matters) != repr(before):
        changed = [key for key in {**before, **matters} if repr(before.get(key)) != repr(matters.get(key))]
        assert found != computes(good), f"seed {seed}, {mutant.told}: {changed} made no difference"
    read = {leaf.outputs[0].name for leaf in opened.graph.leaves}
    for name, weight in opened.file.weights.items():
        assert name in read, f"seed {seed}, {mutant.told}: {name} is not read"
        assert weight.planes
    # Without a head of its own a model has that of its embeddings.
    missing = good.file.weights.keys() - opened.file.weights.keys() - {"output.weight"}
    assert not missing, f"seed {seed}, {mutant.told}: {missing}"
    return "opened"


def test_one_thing_wrong_is_refused_or_opened_as_it_is(mutants, tmp_path):
    outcomes = [check(mutants, seed, tmp_path) for seed in range(SEEDS)]
    assert 0.05 < outcomes.count("opened") / SEEDS < 0.5


@pytest.mark.slow
def test_five_thousand_wrong_things(mutants, tmp_path):
    for seed in range(SEEDS, SEEDS + SLOW_SEEDS):
        check(mutants, seed, tmp_path)


def test_mutants_are_written_as_files_are(mutants):
    """So that a refusal is of what was changed, and not of how it is written."""
    make, good = mutants[1]
    path = good.file.path.with_name("rewritten.gguf")
    path.write_bytes(make.unchanged())
    for ours, theirs in zip(open_model(path).file.weights.values(), gguf.GGUFReader(path).tensors, strict=True):
        np.testing.assert_array_equal(ours.planes[0].numpy(), theirs.data)
