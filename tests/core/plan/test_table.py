"""Tables: alike layers as one row, long names shortened, and lines that keep within a width."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from command import expanded, read_table
from kernelmux.plan.table import NAME_WIDTH, grouped, short, table

WORDS = st.from_regex(r"[a-z]{1,12}( [a-z]{1,12}){0,5}", fullmatch=True)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["a", "b"], ["a", "b"]),
        (["blk.0.q", "blk.1.q", "blk.2.q"], ["blk.0..2.q"]),
        (["blk.0.q", "blk.2.q", "blk.3.q", "blk.10.q"], ["blk.0,2..3,10.q"]),
        (["blk.3.q", "blk.0.k", "blk.1.q", "blk.2.q"], ["blk.1..3.q", "blk.0.k"]),
        (["blk.0.a+1.b", "blk.1.a+2.b", "blk.4.a+5.b"], ["blk.0..1,4.a+1..2,5.b"]),
        (["blk.0.q.as_f32", "blk.1.q.as_f32"], ["blk.0..1.q.as_f32"]),
    ],
)
def test_names_that_differ_in_the_layer_alone_are_one(names: list[str], shown: list[str]):
    rows = [name for name, _ in grouped((name, "") for name in names)]
    assert rows == shown
    assert sorted(node for name in rows for node in expanded(name)) == sorted(names)


def test_rows_that_differ_in_a_cell_stay_apart_and_stand_together():
    rows = [("blk.0.v", "Q6_K"), ("blk.0.q", "Q4_K"), ("blk.1.v", "Q4_K"), ("blk.2.v", "Q6_K")]
    assert grouped(rows) == [("blk.0,2.v", "Q6_K"), ("blk.1.v", "Q4_K"), ("blk.0.q", "Q4_K")]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("blk.0..31.attn_q", "blk.0..31.attn_q"),
        ("blk.0..31.ffn_gate+ffn_up", "blk.0..31.ffn_gate+ffn_up"),
        ("blk.0..31.ffn_gate+ffn_up+ffn_silu+ffn_mul", "blk.0..31.ffn_gate+..+ffn_mul"),
        ("blk.0..3,6,9,12,15,18,21,24,27..31.attn_v", "blk.0..3,..,27..31.attn_v"),
    ],
)
def test_a_long_name_keeps_its_ends(name: str, shown: str):
    assert short(name) == shown
    assert len(shown) <= NAME_WIDTH


@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=6), st.integers(50, 120))
def test_every_word_of_a_table_is_on_a_line_that_fits(rows: list[tuple[str, str, str]], width: int):
    lines = list(table(("one", "two", "three"), rows, width))
    assert max(map(len, lines)) <= width
    words = [word for row in [("one", "two", "three"), *rows] for cell in row for word in cell.split()]
    assert sorted(" ".join(lines).split()) == sorted(words)


@given(st.lists(st.tuples(WORDS, st.sampled_from(["", "x", "two words"]), WORDS), min_size=1, max_size=6))
def test_a_cropped_table_has_a_line_a_row_and_loses_only_ends_of_last_cells(rows: list[tuple[str, str, str]]):
    lines = list(table(("one", "two", "three"), rows, 100, crop=True))
    found = read_table(lines)
    assert found[0] == ["one", "two", "three"]
    for (first, second, last), shown in zip(rows, found[1:], strict=True):
        assert shown[:2] == [first, second or "-"]
        assert shown[2] == last or last.startswith(shown[2].removesuffix(".."))
