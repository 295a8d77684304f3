"""Guarded memory: what lies outside is seen when it changes, what lies inside is poisoned, kept and put back."""

import pytest
import torch

from kernelmux.conformance.guarded import POISONS, Guarded
from kernelmux.graph.formats import ALIGNMENT, FORMATS, Value
from wrong.kernel import beyond

ACTIVATIONS = [name for name, format in FORMATS.items() if format.rounding]


@pytest.fixture
def memory():
    return Guarded.of(Value("x", (3, 64), "q8_32"), "cpu")


@pytest.mark.parametrize("format", ACTIVATIONS)
def test_planes_have_the_shapes_of_their_format_and_the_alignment_of_a_plan(format):
    value = Value("x", (3, 128), format)
    parts = Guarded.of(value, "cpu").parts
    assert [tuple(part.shape) for part in parts] == [plane.shape(value.extents) for plane in FORMATS[format].planes]
    assert [part.data_ptr() % ALIGNMENT for part in parts] == [0] * len(parts)


def test_one_plane_is_given_bare_and_several_as_a_tuple(memory):
    assert isinstance(Guarded.of(Value("x", (3,)), "cpu").planes, torch.Tensor)
    assert len(memory.planes) == 3


@pytest.mark.parametrize("plane", [0, 1, 2])
@pytest.mark.parametrize("offset", [-64, -1, 0, 63])
def test_a_write_before_or_after_any_plane_is_seen(memory, plane, offset):
    part = memory.parts[plane]
    beyond(part, offset if offset < 0 else part.numel() + offset).zero_()
    assert memory.overwritten()


def test_a_write_of_one_element_into_the_padding_of_an_odd_size_is_seen():
    memory = Guarded.of(Value("x", (1, 3), "f16"), "cpu")
    beyond(memory.parts[0], 3).zero_()
    assert memory.overwritten()


def test_writing_every_element_leaves_the_guards(memory):
    for part in memory.parts:
        part.fill_(7)
    assert not memory.overwritten()


@pytest.mark.parametrize("pattern", POISONS)
def test_poison_fills_the_planes_and_nothing_else(memory, pattern):
    memory.poison(pattern)
    assert not memory.overwritten()
    assert all((part.view(torch.uint8) == pattern).all() for part in memory.parts)


def test_the_two_poisons_differ_in_every_byte_and_one_is_nan():
    assert POISONS[0] != POISONS[1]
    memory = Guarded.of(Value("x", (2, 2)), "cpu")
    memory.poison(0xFF)
    assert memory.parts[0].isnan().all()


def test_a_snapshot_is_a_copy_and_is_put_back_bit_for_bit(memory):
    memory.poison(POISONS[0])
    before = memory.snapshot()
    memory.parts[1].fill_(2.5)
    assert not memory.snapshot().equal(before)
    memory.restore(before)
    assert memory.snapshot().equal(before)
    assert not memory.overwritten()


def test_what_is_read_beyond_a_tensor_cannot_be_hidden_by_a_factor_of_zero():
    memory = Guarded.of(Value("x", (3, 5)), "cpu")
    assert (0 * beyond(memory.parts[0], 15)).isnan()


def test_scratch_of_no_bytes_has_guards_all_the_same():
    memory = Guarded.scratch(0, "cpu")
    assert memory.parts[0].numel() == 0
    assert not memory.overwritten()
    beyond(memory.parts[0], 0).zero_()
    assert memory.overwritten()


@pytest.mark.parametrize("element", [4096, 3 * 4096 - 1, -1, -2 * 4096])
def test_a_band_holds_two_rows(element):
    memory = Guarded.of(Value("x", (1, 4096)), "cpu")
    beyond(memory.parts[0], element).zero_()
    assert memory.overwritten()


@pytest.mark.parametrize("element", [128, 2 * 128 - 1, -1, -2 * 128])
def test_a_band_holds_two_columns_where_they_lie_together(element):
    memory = Guarded.of(Value("x", (1, 128 * 128), "fp8_block"), "cpu")
    beyond(memory.parts[1], element).zero_()
    assert memory.overwritten()


def test_the_band_of_scratch_is_as_long_as_it_is():
    memory = Guarded.scratch(10_000, "cpu")
    beyond(memory.parts[0], 19_999).zero_()
    assert memory.overwritten()


def test_it_is_told_how_far_away_what_was_overwritten_is():
    memory = Guarded.of(Value("x", (2, 8), "f32"), "cpu")
    (part,) = memory.parts
    around = torch.as_strided(part, (32,), (1,), part.storage_offset() - 4)
    around[20:22] = 1.0
    assert memory.overwritten() == "8 bytes were overwritten after it"
    around[20:22] = around[23]
    around[2] = 1.0
    assert memory.overwritten() == "4 bytes were overwritten before it, the nearest 4 bytes away"
