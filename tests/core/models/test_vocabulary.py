"""What a file may say of its tokenizer, and the one line that tells what is wrong with it."""

import time

import pytest

from kernelmux.errors import ModelError
from kernelmux.models import vocabulary
from kernelmux.models.tokenizer import Tokenizer
from kernelmux.models.vocabulary import SpacePrefix, read_vocabulary
from tiny_model import byte_alphabet, tokenizer_metadata
from vocabularies import piece_vocabulary

COUNT = len(tokenizer_metadata()["tokenizer.ggml.tokens"])


def read(base, changes):
    """The vocabulary of some keys with others in their place; None leaves a key out."""
    metadata = base | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return read_vocabulary({key: value for key, value in metadata.items() if value is not None}, "tiny.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, r"'tokenizer.ggml.model': 'bert' is not built in; known: gpt2 .*, llama .*, t5 "),
        ({"model": None}, r"'tokenizer.ggml.model': is missing; the file has: tokenizer.chat_template, tokenizer.ggml"),
        ({"pre": "qwen"}, r"'qwen' is not built in \(did you mean 'qwen2'\?\); known: a.x-4.0, .*qwen2, .*smollm"),
        ({"pre": None}, r"'tokenizer.ggml.pre': is missing"),
        ({"tokens": None}, r"'tokenizer.ggml.tokens': is missing"),
        ({"tokens": "abc"}, r"'tokenizer.ggml.tokens': found str 'abc', list is needed"),
        ({"tokens": ["a", 2]}, r"'tokenizer.ggml.tokens': item 1 is int '2', text is needed"),
        ({"tokens": []}, r"'tokenizer.ggml.tokens': 0 tokens; from 1 to"),
        ({"tokens": ["a", "b", "a"]}, r"'tokenizer.ggml.tokens': 'a' is token 0 and token 2"),
        ({"tokens": ["a" * 5000]}, r"'tokenizer.ggml.tokens': token 0 has 5000 characters; up to 4096 are read"),
        ({"merges": None}, r"'tokenizer.ggml.merges': is missing"),
        ({"merges": [3]}, r"'tokenizer.ggml.merges': item 0 is int '3', text is needed"),
        ({"merges": ["he"]}, r"'tokenizer.ggml.merges': merge 0 is 'he': not two tokens that make a third"),
        ({"merges": ["h e", "he e"]}, r"'tokenizer.ggml.merges': merge 1 is 'he e'"),
        ({"token_type": [1, 1]}, rf"2 types for {COUNT} tokens"),
        ({"token_type": ["3"] * COUNT}, r"'tokenizer.ggml.token_type': item 0 is str '3', int is needed"),
        ({"token_type": [True] * COUNT}, r"'tokenizer.ggml.token_type': item 0 is bool 'True', int is needed"),
        ({"token_type": 3}, r"'tokenizer.ggml.token_type': found int '3', list is needed"),
        ({"eos_token_id": 5000}, r"'tokenizer.ggml.eos_token_id': no token 5000; ids run from 0 to"),
        ({"eos_token_id": "2"}, r"'tokenizer.ggml.eos_token_id': found str '2', int is needed"),
        ({"bos_token_id": True}, r"'tokenizer.ggml.bos_token_id': found bool 'True', int is needed"),
        ({"bos_token_id": None, "add_bos_token": True}, r"'tokenizer.ggml.add_bos_token': asks for a token"),
        ({"eos_token_id": None, "add_eos_token": True}, r"'tokenizer.ggml.add_eos_token': asks for a token"),
        ({"add_bos_token": 1}, r"'tokenizer.ggml.add_bos_token': found int '1', bool is needed"),
        ({"add_eos_token": "yes"}, r"'tokenizer.ggml.add_eos_token': found str 'yes', bool is needed"),
    ],
)
def test_byte_level_keys_that_are_refused(changes, message):
    told(message, tokenizer_metadata(), changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, r"'tokenizer.ggml.scores': is missing"),
        ({"scores": [0.0]}, r"1 scores for \d+ tokens"),
        ({"scores": ["0"]}, r"'tokenizer.ggml.scores': item 0 is str '0', a number is needed"),
        ({"scores": [float("nan")] * 2262}, r"not a number"),
        ({"add_space_prefix": 1}, r"'tokenizer.ggml.add_space_prefix': found int '1', bool is needed"),
        ({"model": "t5", "remove_extra_whitespaces": "no"}, r"remove_extra_whitespaces': found str 'no', bool"),
        ({"model": "t5", "precompiled_charsmap": "x"}, r"precompiled_charsmap': found str 'x', list is needed"),
    ],
)
def test_sentencepiece_keys_that_are_refused(changes, message):
    told(message, piece_vocabulary(), changes)


def told(message, base, changes):
    with pytest.raises(ModelError, match=message) as caught:
        read(base, changes)
    assert str(caught.value).startswith("tiny.gguf: ")
    assert caught.value.file == "tiny.gguf"
    assert "\n" not in str(caught.value)


def test_a_normalisation_that_cannot_be_read():
    metadata = piece_vocabulary("t5", precompiled_charsmap=[1, 2, 3])
    with pytest.raises(ModelError, match=r"precompiled_charsmap': cannot be read"):
        Tokenizer.from_metadata(metadata, "t5.gguf")


def test_what_a_model_implies_where_the_file_does_not_say():
    said = read(piece_vocabulary(), dict.fromkeys(("bos_token_id", "eos_token_id", "unknown_token_id")))
    assert (said.bos_id, said.eos_id, said.unk_id) == (1, 2, 0)
    assert (said.opening, said.closing, said.space_prefix) == ((1,), (), SpacePrefix.FRAGMENTS)
    said = read(piece_vocabulary("t5"), {})
    assert (said.opening, said.closing, said.space_prefix) == ((), (2,), SpacePrefix.NONE)
    said = read(tokenizer_metadata(), {"token_type": None, "bos_token_id": None, "add_bos_token": None})
    assert (said.bos_id, said.opening, set(said.kinds)) == (None, (), {1})


def test_a_vocabulary_may_be_filled_up_with_empty_tokens():
    metadata = tokenizer_metadata()
    tokens = [*metadata["tokenizer.ggml.tokens"], "", ""]
    said = read(metadata, {"tokens": tokens, "token_type": None})
    assert len(said.tokens) == COUNT + 2


def test_counts_are_bounded(monkeypatch):
    monkeypatch.setattr(vocabulary, "MOST_TOKENS", COUNT - 1)
    told(rf"{COUNT} tokens; from 1 to {COUNT - 1} are read", tokenizer_metadata(), {})
    monkeypatch.setattr(vocabulary, "MOST_TOKENS", COUNT)
    monkeypatch.setattr(vocabulary, "MOST_MERGES", 3)
    told(r"10 merges; up to 3 are read", tokenizer_metadata(), {})


def test_as_many_control_tokens_as_a_vocabulary_holds_take_no_time():
    """They took 16 s when `tokenizers` compiled them into one automaton."""
    tokens = [*byte_alphabet(), *(f"<|control_{number}|>" for number in range(100_000))]
    changes = {"tokens": tokens, "token_type": [1] * 256 + [3] * 100_000, "merges": [], "bos_token_id": None}
    metadata = tokenizer_metadata() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    del metadata["tokenizer.ggml.bos_token_id"]
    started = time.process_time()
    words = Tokenizer.from_metadata(metadata, "many.gguf")
    assert words.encode("<|control_99999|>", parse_special=True) == [256 + 99_999]
    assert time.process_time() - started < 4
