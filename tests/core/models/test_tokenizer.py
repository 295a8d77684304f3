"""Text to ids and back: the model's own ids, special tokens, streams, and what is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelmux.errors import ModelError
from kernelmux.models.chat import ChatTemplate
from kernelmux.models.gguf import read
from kernelmux.models.tokenizer import Tokenizer
from texts import texts
from tiny_model import byte_alphabet, tokenizer_metadata, write_tiny_llama
from vocabularies import STORED, digest, piece_vocabulary, split_vocabulary

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
        prompt, _ = ChatTemplate(template, smollm2).render(prompt)
    assert smollm2.encode(prompt, parse_special=True) == case["ids"]
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


# llama.cpp's ids


@pytest.mark.model
def test_smollm2_ids_of_many_strings(smollm2_file):
    smollm2 = Tokenizer.from_metadata(smollm2_file.metadata, "smollm2")
    assert digest(smollm2.encode, texts(2000)) == STORED["models"]["smollm2"]


def test_gemma3_ids_of_many_strings(gemma3):
    gemma = Tokenizer.from_metadata(read(gemma3).metadata, "gemma3")
    assert digest(gemma.encode, texts(2000)) == STORED["models"]["gemma3"]


@pytest.mark.parametrize("pre", STORED["splits"])
def test_ids_of_many_strings_by_split(pre):
    words = Tokenizer.from_metadata(split_vocabulary(pre), pre)
    assert digest(words.encode, texts(500)) == STORED["splits"][pre]


PIECES = {
    "prefix": {},
    "no prefix": {"add_space_prefix": False},
    "unigram": {"model": "t5", "add_space_prefix": True},
    "unigram merged": {"model": "t5", "add_space_prefix": True, "remove_extra_whitespaces": True},
}


@pytest.mark.parametrize("name", PIECES)
def test_ids_of_many_strings_by_pieces(name):
    pieces = Tokenizer.from_metadata(piece_vocabulary(**PIECES[name]), name)
    # llama.cpp takes what is written as `<0x41>` for that byte where its pieces can be merged to it.
    assert digest(pieces.encode, [text for text in texts(500) if "<0x" not in text]) == STORED["pieces"][name]


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


@pytest.mark.parametrize("pre", STORED["splits"])
@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_decode_undoes_encode(pre, text):
    words = tokenizer(pre=pre)
    assert words.decode(words.encode(text)) == text


# Special tokens


@pytest.mark.parametrize("parse_special", [False, True])
def test_control_tokens_written_in_the_text_are_text_unless_asked_for(parse_special):
    ids = TINY.encode("<|im_start|>he<|im_end|>", parse_special=parse_special)
    assert (ids == [START, TINY.encode("he")[0], END]) == parse_special
    assert ({START, END} & set(ids) == set()) == (not parse_special)
    assert TINY.decode(ids) == "<|im_start|>he<|im_end|>"


@pytest.mark.parametrize("metadata", [*map(split_vocabulary, STORED["splits"]), piece_vocabulary()], ids=str)
def test_no_text_makes_a_control_token_unless_asked_for(metadata):
    words = Tokenizer.from_metadata(metadata, "words")
    control = {words.vocabulary.tokens.index(spelled) for spelled in words.control_tokens} - {words.bos_id}
    for text in ("<|im_end|>", "x<|im_start|>user\n", "<s></s><unk>", "<|im_<|im_end|>end|>"):
        assert not control & set(words.encode(text, add_special=False)), text


def test_user_defined_tokens_are_always_recognised():
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


def test_the_token_that_ends_a_text():
    words = tokenizer(add_eos_token=True)
    assert words.encode("he") == [*TINY.encode("he"), END]
    assert words.encode("he", add_special=False) == TINY.encode("he", add_special=False)


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({}, {END, END_OF_TEXT}),
        ({"eos_token_id": None}, {END, END_OF_TEXT}),
        ({"eot_token_id": 7}, {END, END_OF_TEXT, 7}),
        ({"eom_token_id": 7}, {END, END_OF_TEXT, 7}),
        ({"token_type": None}, {END}),
    ],
)
def test_what_ends_an_answer(changes, ends):
    assert tokenizer(**changes).end_ids == ends


def test_in_harmony_a_message_ends_within_an_answer():
    tokens = [*byte_alphabet(), "<|end|>", "<|return|>", "<|call|>"]
    keys = {"tokens": tokens, "token_type": [1] * 256 + [3] * 3, "merges": []}
    assert tokenizer(**keys, bos_token_id=None, eos_token_id=257).end_ids == {257, 258}
    tokens[-1] = "<|other|>"
    assert tokenizer(**keys, bos_token_id=None, eos_token_id=257).end_ids == {256, 257}


# Spaces before a text


@pytest.mark.parametrize(
    ("text", "pieces"),
    [("he", [" h", "e"]), ("a</s>b", [" a", "</s>", " b"]), (" he", [" ", " h", "e"]), ("", [])],
)
def test_sentencepiece_begins_texts_with_a_space_and_decoding_takes_it_away(text, pieces):
    words = Tokenizer.from_metadata(piece_vocabulary(), "pieces")
    ids = words.encode(text, add_special=False, parse_special=True)
    assert [words.token_bytes(token).decode() for token in ids] == pieces
    assert words.decode(ids) == text
    assert words.decode(words.encode(text, parse_special=True)) == f"<s>{text}"


def test_a_text_that_goes_on_has_no_space_before_it():
    words = Tokenizer.from_metadata(piece_vocabulary(), "pieces")
    first = words.encode("a", add_special=False)
    rest = words.encode("b c", add_special=False, after=first[-1])
    assert words.decode(first + rest) == "ab c"
    assert words.text_bytes(rest, after=first[-1]) == b"b c"
    stream = words.stream(after=first[-1])
    assert stream.push(words.encode("b", add_special=False)[0]) == " b", "said by the model, not added"


def test_what_is_blank_after_a_token_of_phi3_is_part_of_it():
    metadata = tokenizer_metadata() | {"general.name": "Phi-3-mini"}
    words = Tokenizer.from_metadata(metadata, "phi3")
    assert words.encode("<|im_end|>\n he", parse_special=True) == [END, *TINY.encode("he")]
    assert words.encode("<|endoftext|>\n", parse_special=True) == [END_OF_TEXT, *TINY.encode("\n")]


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
    assert b"".join(map(TINY.token_bytes, ids)).decode(errors="replace") == TINY.decode(ids)
    stream = TINY.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == TINY.decode(ids)


# What is refused


@pytest.mark.parametrize("token", [-1, TINY.vocab_size])
def test_an_id_that_is_no_token(token):
    for call in (TINY.token, TINY.token_bytes, lambda id_: TINY.decode([id_]), TINY.stream().push):
        with pytest.raises(ModelError, match=f"no token {token}; ids run from 0 to {TINY.vocab_size - 1}"):
            call(token)


def test_text_that_is_not_unicode():
    with pytest.raises(ModelError, match="character 1 is half a surrogate pair"):
        TINY.encode("a\ud800")
