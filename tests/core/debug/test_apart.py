"""How far two kernels' results are apart: by row, whatever numbers they hold, and over launches."""

import math

import pytest
import torch

from kernelmux.debug.apart import Apart, errors_of, ratio

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("found", "wanted", "error", "square"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0, 5.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25, 5.0),
        ([NAN, 1.0], [NAN, 1.0], 0.0, 1.0),
        ([NAN, 1.0], [2.0, 1.0], INF, 5.0),
        ([2.0, 1.0], [NAN, 1.0], INF, 1.0),
        ([INF, 1.0], [INF, 1.0], 0.0, 1.0),
        ([-INF, 1.0], [INF, 1.0], INF, 1.0),
    ],
)
def test_a_row_is_off_by_its_numbers_and_alike_where_both_hold_none(found, wanted, error, square):
    several = torch.tensor([[found, wanted], [wanted, wanted]]), torch.tensor([[wanted, wanted], [wanted, wanted]])
    errors, squares = errors_of(*several)
    assert errors.tolist() == [[error, 0.0], [0.0, 0.0]]
    assert squares[0, 0] == square


@pytest.mark.parametrize(("error", "square", "share"), [(0.0, 0.0, 0.0), (1.0, 0.0, INF), (1.0, 4.0, 0.25)])
def test_an_error_of_nothing_is_infinite_unless_it_is_none(error, square, share):
    assert ratio(error, square) == share


def test_launches_add_up_to_the_worst_the_mean_and_the_rows_beyond_the_bound():
    apart = Apart("blk.0.ffn_up", "mul_mat", "odd:f32", "reference:f32", bound=0.1)
    apart.count([(0.0, 1.0, 3), (0.4, 1.0, 4)])
    apart.count([(0.0, 1.0, 5), (0.1, 1.0, 6)])
    # What pads a step is no launch of it.
    apart.count([])
    assert (apart.launches, apart.worst, apart.position, apart.over) == (2, 0.2, 4, (4, 4))
    assert apart.mean == pytest.approx(0.125)
    assert apart.share == 2.0


def test_a_row_of_next_to_nothing_counts_as_one_of_the_mean():
    apart = Apart("blk.0.ffn_up", "mul_mat", "odd:f32", "reference:f32", bound=0.01)
    apart.count([(1e-9, 1e-12, 0), (0.5, 10.0, 1)])
    assert (apart.position, apart.over) == (1, (1, 1))
