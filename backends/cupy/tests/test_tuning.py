"""Choices that follow from a card and a shape."""

import dataclasses

import pytest

from kernelmux_cupy.pack import TILED, lane_bytes
from kernelmux_cupy.tuning import H100, RESERVED, ROW_COUNTS, Card, Shape, tune

PASCAL = Card(20, 96 * 1024, 48 * 1024, ampere=False)
LAYERS = [(4096, 4096), (4096, 14336), (28672, 4096), (128256, 4096), (1, 256)]


@pytest.mark.parametrize("card", [H100, PASCAL], ids=["H100", "Pascal"])
@pytest.mark.parametrize("format", TILED)
def test_every_shape_fits_every_card(format, card):
    for n, k in LAYERS:
        for m in ROW_COUNTS:
            for shape in (Shape((format,), (n,), k, m), Shape((format,) * 2, (n, n), k, m, gated=True)):
                tuning = tune(shape, card)
                shared = shape.shared(tuning)
                assert shared <= card.shared_per_block
                assert tuning.resident * (shared + RESERVED) <= card.shared
                assert tuning.stages == 1 or card.ampere


@pytest.mark.parametrize(("n", "k"), LAYERS[:4])
def test_an_h100_has_enough_bytes_under_way_for_its_latency(n, k):
    shape = Shape(("Q4_K",), (n,), k, 1)
    tuning = tune(shape, H100)
    blocks = -(-shape.grid(tuning, H100) // H100.multiprocessors)
    assert blocks * tuning.warps * tuning.stages * 4608 >= 60_000


def test_warps_share_the_columns_evenly():
    assert [tune(Shape(("Q4_K",), (4096,), k, 1), H100).warps for k in (4096, 14336, 2048, 256)] == [16, 14, 8, 1]


def test_blocks_take_turns_where_there_are_more_sets_than_run_at_once():
    shape = Shape(("Q4_K",), (28672,), 4096, 1)
    tuning = tune(shape, H100)
    assert shape.grid(tuning, H100) == 132
    assert shape.grid(dataclasses.replace(tuning, loop=False), H100) == 896


def test_sets_that_would_leave_half_of_a_second_turn_idle_run_two_a_multiprocessor():
    assert tune(Shape(("Q4_K",), (6144,), 4096, 1), H100).resident == 2
    assert tune(Shape(("Q4_K",), (4096,), 4096, 1), H100).resident == 1


def test_many_rows_go_to_the_matrix_unit_where_a_card_has_it():
    chosen = {m: tune(Shape(("Q4_K",), (4096,), 4096, m), H100).matrix for m in ROW_COUNTS}
    assert chosen == {1: False, 2: False, 4: True, 8: True, 16: True}
    assert not tune(Shape(("Q4_K",), (4096,), 4096, 16), PASCAL).matrix


@pytest.mark.parametrize("m", ROW_COUNTS)
@pytest.mark.parametrize("format", TILED)
def test_slots_and_rows_lie_well_in_the_banks_of_shared_memory(format, m):
    shape = Shape((format,), (4096,), 4096, m)
    assert shape.slot(1) % 128 == 0
    assert (shape.slot(1) - 32 * lane_bytes(format, 4096)) >= 320 * shape.rows
