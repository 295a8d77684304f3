"""Text to ids and back: the model's own ids, special tokens, streams, and what is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelmux.errors import ModelError
from kernelmux.models.chat import render_chat
from kernelmux.models.gguf import read
from kernelmux.models.tokenizer import SPLITS, Tokenizer
from tiny_model import byte_alphabet, tokenizer_metadata, write_tiny_llama

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "smollm2_greedy.json").read_text(encoding="utf-8"))["cases"]


def tokenizer(**changes):
    """The tiny model's tokenizer with some `tokenizer.ggml` keys replaced; None leaves a key out."""
    metadata = tokenizer_metadata() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return Tokenizer.from_metadata({key: value for key, value in metadata.items() if value is not None}, "tiny.gguf")


def vocabulary(*merges):
    """The keys for one token a byte, the given merges, and a token that no merges lead to."""
    tokens = [*byte_alphabet(), *dict.fromkeys(merge.replace(" ", "") for merge in merges), "unmerged"]
    return {"tokens": tokens, "token_type": [1] * len(tokens), "merges": list(merges)}


TINY = tokenizer()
START, END, END_OF_TEXT = (TINY.vocab_size + offset for offset in (-3, -2, -1))


# The model's own ids


@pytest.fixture
def smollm2_file(smollm2):
    return read(smollm2)


@pytest.mark.model
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: str(case["prompt"])[:24])
def test_smollm2_ids_and_text(smollm2_file, case):
    smollm2 = Tokenizer.from_metadata(smollm2_file.metadata, "smollm2")
    prompt = case["prompt"]
    if isinstance(prompt, list):
        template = smollm2_file.metadata["tokenizer.chat_template"]
        marks = {"bos_token": smollm2.token(smollm2.bos_id), "eos_token": smollm2.token(smollm2.eos_id)}
        prompt = render_chat(template, prompt, **marks)
    assert smollm2.encode(prompt) == case["ids"]
    assert smollm2.decode(case["ids"]) == prompt
    assert smollm2.decode(case["greedy"]) == case["text"]


@pytest.mark.model
def test_smollm2_facts(smollm2_file):
    smollm2 = Tokenizer.from_metadata(smollm2_file.metadata, "smollm2")
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.eos_id) == (49152, 1, 2)
    assert smollm2.end_ids == {2, 0}, "<|im_end|> and <|endoftext|>"
    assert not smollm2.add_bos


@pytest.mark.model
def test_a_byte_that_the_vocabulary_lacks_is_not_dropped_in_silence(smollm2_file):
    smollm2 = Tokenizer.from_metadata(smollm2_file.metadata, "smollm2")
    with pytest.raises(ModelError, match=r"no token for byte 0x04, 0xf1 of the text"):
        smollm2.encode("a\x04b\U00040000")


def test_the_tokenizer_of_a_written_file(tmp_path):
    path = write_tiny_llama(tmp_path / "t.gguf", vocab=300)
    tiny = Tokenizer.from_metadata(read(path).metadata, str(path))
    assert tiny.vocab_size == 300
    assert [tiny.token(token) for token in tiny.encode("the hell")] == ["t", "he", "Ġ", "hell"]


# Splits: a merge never reaches across one


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "a 123", "a Ġ 1 2 3"),
        ("qwen2", "a 123", "a Ġ 1 2 3"),
        ("llama-bpe", "a 1234567", "a Ġ 123 456 7"),
        ("smollm", "HE'LL", "HE ' LL"),
        ("qwen2", "HE'LL", "HE 'LL"),
        ("llama-bpe", "HE'LL", "HE 'LL"),
        ("smollm", "he'll", "he 'll"),
        ("smollm", "!\n\n", "! ĊĊ"),
        ("qwen2", "!\n\n", "!ĊĊ"),
        ("llama-bpe", "!\n\n", "!ĊĊ"),
        ("smollm", "(he", "( he"),
        ("qwen2", "(he", "(he"),
        ("llama-bpe", "(he", "(he"),
        ("smollm", "a  he", "a Ġ Ġhe"),
        ("qwen2", "a  he", "a Ġ Ġhe"),
        ("llama-bpe", "unmerged", "unmerged"),
        ("qwen2", "unmerged", "u n m e r g e d"),
    ],
)
def test_words_are_split_as_the_model_was_trained(pre, text, expected):
    # In order of rank, in which they apply wherever the split lets them.
    merges = ["1 2", "12 3", "4 5", "45 6", "Ġ 1", "h e", "Ġ he", "( he", "H E"]
    merges += ["L L", "' LL", "l l", "' ll", "Ċ Ċ", "! ĊĊ"]
    words = tokenizer(pre=pre, **vocabulary(*merges), bos_token_id=0, eos_token_id=None, add_bos_token=False)
    assert [words.token(token) for token in words.encode(text)] == expected.split()


@pytest.mark.parametrize("pre", SPLITS)
@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_decode_undoes_encode(pre, text):
    words = tokenizer(pre=pre)
    assert words.decode(words.encode(text)) == text


# Special tokens


def test_special_tokens_written_in_the_text_are_recognised():
    ids = TINY.encode("<|im_start|>he<|im_end|>")
    assert ids == [START, TINY.encode("he")[0], END]
    assert TINY.decode(ids) == "<|im_start|>he<|im_end|>"


def test_user_defined_tokens_are_recognised_too():
    metadata = tokenizer_metadata(vocab=300)
    kinds = metadata["tokenizer.ggml.token_type"]
    kinds[299] = 4
    words = tokenizer(tokens=metadata["tokenizer.ggml.tokens"], token_type=kinds)
    assert words.encode("<|unused_30|>") == [299]
    assert len(words.encode("<|unused_29|>")) > 1


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        ({"add_bos_token": True}, True),
        ({"add_bos_token": False}, False),
        ({"add_bos_token": None, "pre": "llama-bpe"}, True),
        ({"add_bos_token": None, "pre": "qwen2"}, False),
        ({"add_bos_token": False, "pre": "llama-bpe"}, False),
    ],
)
def test_the_token_that_begins_a_text(changes, begins):
    words = tokenizer(**changes)
    plain = words.encode("he", add_special=False)
    assert plain == TINY.encode("he", add_special=False)
    assert words.encode("he") == ([START, *plain] if begins else plain)


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({}, {END, END_OF_TEXT}),
        ({"eos_token_id": None}, {END, END_OF_TEXT}),
        ({"eot_token_id": 7}, {END, END_OF_TEXT, 7}),
        ({"token_type": None}, {END}),
    ],
)
def test_what_ends_an_answer(changes, ends):
    assert tokenizer(**changes).end_ids == ends


# Streams


def test_a_stream_waits_for_whole_characters():
    stream = TINY.stream()
    assert [stream.push(token) for token in TINY.encode("é🙂!")] == ["", "é", "", "", "", "🙂", "!"]
    assert stream.flush() == ""


def test_a_stream_gives_up_on_half_a_character_at_the_end():
    stream = TINY.stream()
    assert [stream.push(token) for token in TINY.encode("🙂")[:-1]] == [""] * 3
    assert stream.flush() == "\ufffd"


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.lists(st.integers(0, TINY.vocab_size - 1)))
def test_a_stream_says_what_decode_says(ids):
    stream = TINY.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == TINY.decode(ids)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, r"'tokenizer.ggml.model': 'llama' is not built in; known: gpt2"),
        ({"model": None}, r"'tokenizer.ggml.model': is missing; the file has: tokenizer.chat_template, tokenizer.ggml"),
        ({"pre": "qwen"}, r"'qwen' is not built in \(did you mean 'qwen2'\?\); known: llama-bpe, qwen2, smollm"),
        ({"pre": None}, r"'tokenizer.ggml.pre': is missing"),
        ({"tokens": None}, r"'tokenizer.ggml.tokens': is missing"),
        ({"tokens": "abc"}, r"'tokenizer.ggml.tokens': found str 'abc', list is needed"),
        ({"tokens": [1, 2]}, r"'tokenizer.ggml.tokens': not all of its items are text"),
        ({"merges": None}, r"'tokenizer.ggml.merges': is missing"),
        ({"merges": ["he"]}, r"'tokenizer.ggml.merges': merge 0 is 'he': not two tokens that make a third"),
        ({"merges": ["h e", "he e"]}, r"'tokenizer.ggml.merges': merge 1 is 'he e'"),
        ({"token_type": [1, 1]}, rf"2 types for {TINY.vocab_size} tokens"),
        ({"eos_token_id": 5000}, r"'tokenizer.ggml.eos_token_id': no token 5000; ids run from 0 to"),
        ({"bos_token_id": True}, r"'tokenizer.ggml.bos_token_id': found bool 'True', int is needed"),
        ({"bos_token_id": None, "add_bos_token": True}, r"'tokenizer.ggml.add_bos_token': asks for a token"),
        ({"add_bos_token": 1}, r"'tokenizer.ggml.add_bos_token': found int '1', bool is needed"),
    ],
)
def test_metadata_that_is_no_tokenizer(changes, message):
    with pytest.raises(ModelError, match=message) as caught:
        tokenizer(**changes)
    assert str(caught.value).startswith("tiny.gguf: ")
    assert caught.value.file == "tiny.gguf"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token", [-1, TINY.vocab_size])
def test_an_id_that_is_no_token(token):
    for call in (TINY.token, TINY.token_bytes, lambda id_: TINY.decode([id_]), TINY.stream().push):
        with pytest.raises(ModelError, match=f"no token {token}; ids run from 0 to {TINY.vocab_size - 1}"):
            call(token)


def test_text_that_is_not_unicode():
    with pytest.raises(ModelError, match="character 1 is half a surrogate pair"):
        TINY.encode("a\ud800")
