"""Files whole and damaged are loaded as by llama.cpp, but where docs/model-files.md gives a reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kernelmux.errors import KernelmuxError, ModelError
from kernelmux.models import open_model
from kernelmux.models.gguf import read
from llama_cpp_files import NO_WORDS, files, headers, stored_verdicts

pytest.importorskip("transformers", reason="transformers, whose models files are made of, is not installed")

DOCS = Path(__file__).parents[3] / "docs" / "model-files.md"
REFUSED_HERE = {
    "is no UTF-8": r"is not UTF-8",
    "under the architecture's prefix that nothing here reads": (
        r"models are not built with this key|That is missing; the file is damaged|only True is built in"
    ),
    "with which no model computes": (
        r"a positive number is needed|a number above 1|a count from \d on|a count up to|an even count up to"
    ),
    "that is no flag, or not one for each layer": r"true or false (for each of \d+ layers )?is needed",
    "values of another size than keys": r"values of another size are not built in",
    "no `tokenizer.ggml.pre`": (
        r"'tokenizer\.ggml\.\w+': (is missing|asks for a token|no token|merge \d+ is|\d+ types for)"
    ),
    "A matrix or a norm as integers": r"is stored as i32",
    "that an architecture has": r"tensor 'blk\.\d+\.(ffn_gate_exps|attn_q)\.weight' is missing",
    "A mixture of experts without `feed_forward_length`": r"lacks [\w-]+\.feed_forward_length",
}
"""By words of the documentation: what is refused here and loaded by llama.cpp, by our message."""
LOADED_HERE = {
    "of another type than usual": r"has wrong type \w+ but expected|invalid gguf type for tokenizer\.ggml\.\w+",
    "only a part turns": r"invalid n_rot",
    "a tensor for each expert": r"tensor 'blk\.0\.ffn_down_exps\.weight' not found",
    "without `expert_feed_forward_length`": r"key not found in model: gpt-oss\.expert_feed_forward_length",
}
"""And what is loaded here and refused by llama.cpp, by its message."""


OF_HEADERS = {
    "is no UTF-8": r"is not UTF-8",
    "of which others are missing": r"is part \d+ of \d+|'split\.count': found",
    "without dimensions or without elements": r"0 dimensions; from 1|has no elements",
    "whose data is not there": r"the file has \d+; it is truncated",
}
"""And of headers, by themselves, which ggml's reader takes."""


def refusal(path):
    """Why a file is refused, its vocabulary too, where it has one; empty where it is loaded."""
    try:
        source = open_model(path)
        if source.file.metadata.get("tokenizer.ggml.model") != NO_WORDS["tokenizer.ggml.model"]:
            assert source.tokenizer
        return ""
    except KernelmuxError as error:
        return str(error).removeprefix(f"{path}: ")


def test_every_difference_has_a_reason(tmp_path):
    stored, used, alike = stored_verdicts()["files"], set(), 0
    path = tmp_path / "file.gguf"
    for name, mutant in files(tmp_path):
        path.write_bytes(mutant.data)
        if name not in stored:
            continue  # Of an architecture that has come since llama.cpp was asked.
        told, theirs = stored.pop(name)
        assert told == mutant.told, f"{name}: tests/bench/llama_cpp_loads.py asks llama.cpp anew"
        ours = refusal(path)
        if bool(ours) == bool(theirs):
            alike += 1
            continue
        reasons = REFUSED_HERE if ours else LOADED_HERE
        found = [reason for reason, message in reasons.items() if re.search(message, ours or theirs)]
        assert len(found) == 1, f"{name}, {mutant.told}: {ours or 'loaded'}; llama.cpp: {theirs or 'loaded'}"
        used.add(found[0])
    assert all(name.startswith("header: ") for name in stored)
    assert used == {*REFUSED_HERE, *LOADED_HERE}
    assert alike > 1000


def test_every_header_that_ggml_takes_has_a_reason(tmp_path):
    stored, used = stored_verdicts()["files"], set()
    for name, data in headers():
        (tmp_path / "file.gguf").write_bytes(data)
        with pytest.raises(ModelError) as refused:
            read(tmp_path / "file.gguf")
        if not stored[name][1]:
            found = [reason for reason, message in OF_HEADERS.items() if re.search(message, str(refused.value))]
            assert len(found) == 1, f"{name}: {refused.value}"
            used.add(found[0])
    assert used == {*OF_HEADERS}


def test_reasons_are_those_of_the_documentation():
    listed = " ".join(DOCS.read_text("utf-8").split())
    for reason in (*REFUSED_HERE, *LOADED_HERE, *OF_HEADERS):
        assert reason in listed, reason
