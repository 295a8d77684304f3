"""SentencePiece's merging by scores, beside the plainest one that there is."""

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelmux.errors import ModelError
from kernelmux.models.tokenizer import Tokenizer
from vocabularies import BYTE, NORMAL, UNKNOWN, piece_vocabulary


def tokenizer(pieces, **changes):
    """A vocabulary of `<unk>`, the bytes, and pieces with their scores."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    kinds = [UNKNOWN, *[BYTE] * 256, *[NORMAL] * len(pieces)]
    scores = [0.0] * 257 + list(pieces.values())
    keys = {"add_space_prefix": False, "add_bos_token": False, "bos_token_id": None, "eos_token_id": None, **changes}
    return Tokenizer.from_metadata(piece_vocabulary(tokens=tokens, token_type=kinds, scores=scores, **keys), "pieces")


def plainly(pieces, text):
    """All pairs looked at for each merge: the highest score, the leftmost of these."""
    parts = list(text)
    while True:
        pairs = [(-pieces[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in pieces]
        if not pairs:
            return parts
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


LETTERS = {"a": -1.0, "b": -1.0, "\u2581": -1.0}


@given(
    st.dictionaries(st.text("ab\u2581", min_size=2, max_size=5), st.integers(-3, 0).map(float), max_size=12),
    st.text("ab ", max_size=30),
)
def test_the_pair_of_the_highest_score_is_merged_first_and_of_ties_the_leftmost(pieces, text):
    pieces = pieces | LETTERS
    words = tokenizer(pieces)
    expected = plainly(pieces, text.replace(" ", "\u2581"))
    assert [words.token(token) for token in words.encode(text)] == expected


def test_what_has_no_piece_is_its_bytes():
    words = tokenizer(LETTERS)
    ids = words.encode("aé🙂")
    assert [words.token(token) for token in ids] == ["a", *(f"<0x{byte:02X}>" for byte in "é🙂".encode())]
    assert words.decode(ids) == "aé🙂"
    stream = words.stream()
    assert [stream.push(token) for token in ids] == ["a", "", "é", "", "", "", "🙂"]


def test_a_byte_that_the_vocabulary_lacks_is_told():
    keys = {"tokens": ["<unk>", "a"], "token_type": [UNKNOWN, NORMAL], "scores": [0.0, 0.0]}
    ids = {"bos_token_id": None, "eos_token_id": None, "add_bos_token": False}
    words = Tokenizer.from_metadata(piece_vocabulary(**keys, **ids), "few.gguf")
    with pytest.raises(ModelError, match=r"few.gguf: the vocabulary has no token for byte 0xe2, 0x96, 0x81|0x81"):
        words.encode("a")


def test_a_long_text_without_a_space_takes_no_time():
    words = Tokenizer.from_metadata(piece_vocabulary(), "pieces")
    started = time.process_time()
    ids = words.encode("漢字かな交じり文" * 5000, add_special=False)
    assert words.decode(ids) == "漢字かな交じり文" * 5000
    assert time.process_time() - started < 5
