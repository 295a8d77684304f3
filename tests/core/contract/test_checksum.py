"""A checksum tells any bytes from any others that a disk, a program or a person may put in their place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernelmux.contract import checksum as module
from kernelmux.contract.checksum import CHUNK, checksum


def bytes_of(count, seed=0):
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def total(data, first=0):
    return int(checksum(data, first))


SIZES = (0, 1, 7, 8, 9, 8 * CHUNK - 1, 8 * CHUNK, 8 * CHUNK + 1, 8 * CHUNK * 3 + 8 * 5 + 3)


@pytest.mark.parametrize("size", SIZES)
def test_any_bit_changes_it(size):
    data, places = bytes_of(size), {0, size // 3, size // 2, max(size - 9, 0), size - 1} if size else set()
    for place in places:
        for bit in range(8):
            other = data.clone()
            other[place] ^= 1 << bit
            assert total(other) != total(data)


@given(st.lists(st.tuples(st.integers(0, 3 * CHUNK - 1), st.integers(0, 63)), min_size=2, max_size=4, unique=True))
def test_changed_bits_do_not_cancel(places):
    """The top bits of two words, were they not mixed, would: they have the same weight, whatever the factors."""
    words = torch.zeros(3 * CHUNK, dtype=torch.int64)
    before = total(words.view(torch.uint8))
    for place, bit in places:
        words[place] ^= (1 << bit) - 2**64 * (bit == 63)
    assert total(words.view(torch.uint8)) != before


@given(one=st.integers(0, 3 * CHUNK - 1), other=st.integers(0, 3 * CHUNK - 1))
def test_words_in_another_order_have_another(one, other):
    words = bytes_of(24 * CHUNK).view(torch.int64)
    swapped = words.clone()
    swapped[[one, other]] = words[[other, one]]
    assert (total(swapped.view(torch.uint8)) == total(words.view(torch.uint8))) == (words[one] == words[other])


def test_parts_add_up_wherever_they_are_cut_and_however_many_are_summed_at_once(monkeypatch):
    data = bytes_of(8 * CHUNK * 9 + 77)
    whole = total(data)
    for cut in (1, 4, 9):
        assert (total(data[: 8 * CHUNK * cut]) + total(data[8 * CHUNK * cut :], cut) - whole) % 2**64 == 0
    monkeypatch.setattr(module, "AT_ONCE_A_THREAD", 1)
    assert total(data) == whole


@pytest.mark.parametrize("offset", [1, 4, 8])
def test_where_the_bytes_lie_changes_nothing(offset):
    data = bytes_of(8 * CHUNK + 100)
    assert total(data[offset:]) == total(data[offset:].clone())


def test_it_is_the_same_in_every_version():
    """Files that were written are read: a formula that changes is another layout."""
    assert total(torch.arange(8 * CHUNK * 2 + 13).to(torch.uint8)) == -2459554012777461320
