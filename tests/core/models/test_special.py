"""Where special tokens stand in a text."""

from hypothesis import given
from hypothesis import strategies as st

from kernelmux.models.special import SpecialTokens


def split(text, *tokens, stripping=()):
    special = SpecialTokens({token: place for place, token in enumerate(tokens)}, stripping)
    return list(special.split(text))


def test_tokens_and_text_in_turn():
    assert split("a<s>b<s><e>", "<s>", "<e>") == ["a", 0, "b", 0, 1]
    assert split("", "<s>") == []
    assert split("plain", "<s>") == ["plain"]
    assert split("plain") == ["plain"]
    assert split("[a]-^", "[", "]", "-", "^") == [0, "a", 1, 2, 3]


def test_of_two_that_overlap_the_longer_one_wins_wherever_it_stands():
    assert split("abcd", "ab", "bcd") == ["a", 1]
    assert split("<s><s>>", "<s>", "<s>>") == [0, 1]
    assert split("aaa", "aa") == [0, "a"]


def test_longer_is_told_in_bytes():
    assert split("abcé", "abc", "cé", "c\u6f22") == [0, "é"]
    assert split("abc漢", "abc", "c\u6f22") == ["ab", 1]


def test_blanks_after_a_token_that_strips_are_dropped():
    assert split("<s> \n a <e> b", "<s>", "<e>", stripping={0}) == [0, "a ", 1, " b"]
    assert split("<s>  ", "<s>", stripping={0}) == [0]
    assert split("<s>  <e>", "<s>", "<e>", stripping={0}) == [0, 1]


@given(st.text("<s>ab", max_size=40), st.sets(st.text("<s>ab", min_size=1, max_size=4), max_size=5))
def test_the_parts_make_the_text(text, tokens):
    spelled = sorted(tokens)
    parts = split(text, *spelled)
    assert "".join(part if isinstance(part, str) else spelled[part] for part in parts) == text
    assert not any(token in part for part in parts if isinstance(part, str) for token in spelled)
