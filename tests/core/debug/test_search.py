"""The search for who is to blame, against sets that are known: it finds all of them, and asks few times."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from kernelmux.debug.search import accomplices, shortest_prefix, to_blame

THINGS = list(range(100))


@given(needed=st.integers(1, 100), count=st.integers(1, 100))
def test_the_shortest_prefix_takes_log2_tries(needed: int, count: int):
    needed, asked = min(needed, count), []

    def holds(prefix):
        asked.append(len(prefix))
        return len(prefix) >= needed

    assert shortest_prefix(THINGS[:count], holds) == needed
    assert len(asked) <= math.ceil(math.log2(count)) if count > 1 else not asked


@given(wrong=st.sets(st.integers(0, 99), min_size=1, max_size=5))
def test_each_of_several_faults_is_blamed_and_nothing_else(wrong: set[int]):
    tries = []

    def heals(some):
        tries.append(some)
        return wrong <= set(some)

    assert set(to_blame(THINGS, heals, heals) or ()) == wrong
    assert len(tries) <= len(wrong) * (math.ceil(math.log2(len(THINGS))) + 1)


@given(wrong=st.sets(st.integers(0, 99), min_size=2, max_size=60), seen=st.sets(st.integers(0, 99), max_size=60))
def test_where_signs_show_all_of_many_no_more_tries_are_needed(wrong: set[int], seen: set[int]):
    """Whether signs show all, some or others: those to blame are found, and who else is named was shown."""
    tries = []

    def heals(some):
        tries.append(some)
        return wrong <= set(some)

    assert wrong <= set(to_blame(THINGS, heals, heals, lambda: wrong) or ())
    assert len(tries) <= math.ceil(math.log2(len(THINGS))) + 2
    assert wrong <= set(to_blame(THINGS, heals, heals, lambda: seen) or ()) <= wrong | seen


@given(pair=st.sets(st.integers(0, 99), min_size=2, max_size=4))
def test_of_faults_that_only_show_together_one_is_blamed_and_the_others_are_found(pair: set[int]):
    def heals(some):
        return bool(pair & set(some))

    def fails(kept):
        return pair <= set(kept)

    blamed = to_blame(THINGS, heals, heals)
    assert blamed == [min(pair)]
    assert set(accomplices(THINGS, blamed, fails)) == pair - {min(pair)}


def test_where_exchanging_all_heals_nothing_nobody_is_blamed():
    assert to_blame(THINGS, lambda some: len(some) > 60, lambda some: False) is None
    assert to_blame([], lambda some: True, lambda some: True) is None


def test_whoever_fails_alone_has_no_accomplice():
    assert accomplices(THINGS, [3], lambda kept: 3 in kept) == []
    assert accomplices(THINGS, [3], lambda kept: False) == []
