"""Where wrong elements sit, in words: an error is planted at a known place, and the words name it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelmux.conformance.located import Layout
from kernelmux.conformance.measure import compare

HEAD, BLOCK = 16, 32
LAYOUT = Layout("y", HEAD, BLOCK)


def said(shape, *places, layout=LAYOUT):
    """What is said of an output that is wrong in these places alone, by way of the whole comparison."""
    wanted = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, wrong = wanted.clone(), torch.zeros(shape, dtype=torch.bool)
    for place in places:
        found[place] += 9
        wrong[place] = True
    # Noise that is within the bound is not what is wrong.
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (failure,) = compare(found + 1e-3 * noise, wanted, 1e-5, layout=layout).failures
    assert failure.endswith(f"; {layout.located(wrong)}")
    share, _, where = failure.rpartition("; ")[2].partition(", ")
    assert share == f"{100 * float(wrong.double().mean()):.3g} % of its elements are wrong" or not where
    return where or share


@pytest.mark.parametrize(
    ("place", "where"),
    [
        ((slice(None), -1), "all in the last column"),
        ((slice(None), 40), "all in column 40"),
        ((slice(None), slice(16, 32)), "all in head 1 of 6"),
        ((slice(None), slice(83, 85)), "all in head 5 of 6, 12.5 % of those there"),
        ((slice(None), slice(70, 90)), "all in the last block of 32 columns, 62.5 % of those there"),
        ((slice(None), [*range(60, 70), *range(71, 96)]), "all in columns from 60 on, 97.2 % of those there"),
        ((slice(None), [7, 8, 9, 20, 21, 60, 61]), "all in columns 7..61, 12.7 % of those there"),
        (([0, 1, 3], slice(0, None, 2)), "all in rows 0, 1, 3 and columns 0, 2 .. 94"),
        (([[0], [1], [3]], [*range(0, 96, 5), 3]), "all in rows 0, 1, 3, 21.9 % of those there"),
        ((slice(None), slice(30, 40)), "all in columns 30..39"),
        ((slice(None), slice(60, None)), "all in columns from 60 on"),
        ((slice(None), [1, 40, 70]), "all in columns 1, 40, 70"),
        ((slice(None), slice(0, None, 7)), "all in columns 0, 7 .. 91"),
        ((slice(0, None, 2),), "all in rows 0, 2, 4, 6"),
        ((slice(None), slice(64, None)), "all in heads from 4 on of 6"),
        ((slice(None), slice(32, 64)), "all in heads 2..3 of 6"),
        ((slice(1, 3), slice(0, 90)), "all in rows 1..2 and columns 0..89"),
        (([1, 2], [3, 60]), "all in rows 1..2 and columns 3, 60, 50 % of those there"),
        ((0,), "all in row 0"),
        ((-1,), "all in the last row"),
        ((slice(4, None),), "all in rows from 4 on"),
        ((slice(1, 3),), "all in rows 1..2"),
        ((slice(2, None), -1), "all in rows from 2 on and the last column"),
        ((3, slice(0, 16)), "all in row 3 and head 0 of 6"),
        ((2, 95), "it alone is wrong"),
        ((), "everywhere"),
    ],
)
def test_the_place_of_an_error_is_named(place, where):
    assert said((7, 96), place) == where


def test_heads_and_blocks_are_named_only_where_there_are_some():
    assert said((7, 96), (slice(None), slice(16, 32)), layout=Layout()) == "all in columns 16..31"
    assert said((7, 16), (slice(None), slice(2, 5))) == "all in columns 2..4"
    assert said((7, 96), (slice(None), slice(70, 90)), layout=Layout("y", 0, 1)) == "all in columns 70..89"


def test_the_last_block_of_columns_may_be_a_part_of_one():
    part = said((7, 72), (slice(None), slice(65, 72)), layout=Layout("y", 0, 32))
    assert part == "all in the last block of 32 columns, 87.5 % of those there"
    assert said((7, 72), (slice(None), slice(63, 72)), layout=Layout("y", 0, 32)) == "all in columns from 63 on"


def test_a_cache_has_rows_of_heads():
    """[pages, page_size, heads, head_dim]: row 9 is the second of page 2."""
    assert said((3, 4, 6, 16), (2, 1)) == "all in row 9"
    assert said((3, 4, 6, 16), (slice(None), slice(None), 4)) == "all in head 4 of 6"


def test_an_output_of_one_extent_is_a_row():
    assert said((96,), slice(90, None)) == "all in head 5 of 6, 37.5 % of those there"
    assert said((96,), -1) == "it alone is wrong"


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.data())
def test_what_is_named_holds_the_wrong_elements_and_no_others(data):
    """A rectangle is planted; the words, read again, are that rectangle."""
    rows, columns = data.draw(st.integers(2, 9)), data.draw(st.integers(2, 40))
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    bottom, right = data.draw(st.integers(top + 1, rows)), data.draw(st.integers(left + 1, columns))
    wrong = torch.zeros(rows, columns, dtype=torch.bool)
    wrong[top:bottom, left:right] = True
    words = Layout().located(wrong)
    if wrong.sum() == 1:
        assert words == "it alone is wrong"
        return
    again = torch.ones(rows, columns, dtype=torch.bool)
    for place in words.partition("all in ")[2].split(" and ") if "all in" in words else ():
        kept = torch.zeros(rows, columns, dtype=torch.bool)
        (kept if "row" in place else kept.T)[_indices(place, rows if "row" in place else columns)] = True
        again &= kept
    assert again.equal(wrong)


def _indices(place, extent):
    """`rows from 3 on` as a slice."""
    words = place.removeprefix("the ").split()
    if words[0] == "last":
        return slice(extent - 1, extent)
    if "from" in words:
        return slice(int(words[2]), extent)
    first, _, last = words[1].partition("..")
    return slice(int(first), int(last or first) + 1)


# The worst element.


def failure(found, wanted, **options):
    (said,) = compare(found, wanted, 1e-5, **options).failures
    return said


def test_the_worst_element_is_shown_with_what_was_expected_and_the_extents():
    wanted = torch.full((5, 512), 0.98, dtype=torch.float64)
    found = wanted.clone()
    found[3, 511], found[1, 2] = 1.25, 1.0
    assert "; the worst is y[3, 511] = 1.25, expected 0.98 of [5, 512]; " in failure(found, wanted)
    assert "; the worst is k_cache[3, 511] = " in failure(found, wanted, layout=Layout("k_cache"))


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_the_first_element_that_is_not_finite_is_shown(number):
    wanted = torch.full((5, 512), 0.98, dtype=torch.float64)
    found = wanted.clone()
    found[1, 2] = 7
    found[2:, 511] = number
    where = "0.117 % of its elements are wrong, all in rows from 2 on and the last column"
    assert failure(found, wanted) == f"finite: y[2, 511] = {number}, expected 0.98 of [5, 512]; {where}"


def test_an_error_of_all_elements_alike_is_everywhere():
    wanted = torch.randn(8, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(8, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert failure(wanted + 0.004 * noise, wanted).endswith(" % of its elements are wrong, everywhere")
