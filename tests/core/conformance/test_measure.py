"""How far a result is from the truth: what counts as wrong, over the whole and in one place."""

import pytest
import torch

from kernelmux.conformance.measure import WORST, compare

BOUND = 1e-4


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def found(wanted, change):
    """The names of what is wrong once `change` has been done to a copy of the truth."""
    result = wanted.clone()
    change(result)
    return [failure.partition(":")[0] for failure in compare(result, wanted, BOUND).failures]


def put(where, number):
    return lambda result: result.__setitem__(where, number)


def test_the_truth_is_right_and_has_no_error():
    measured = compare(noise(4, 64), noise(4, 64), 0.0)
    assert measured.failures == ()
    assert (measured.error, measured.worst) == (0.0, 0.0)


@pytest.mark.parametrize(("size", "names"), [(0.009, []), (0.011, ["error"])])
def test_the_bound_is_on_the_squared_error_over_the_squared_truth(size, names):
    assert found(noise(4, 64), lambda result: result.mul_(1 + size)) == names


def test_one_element_far_off_is_seen_where_the_whole_is_within_the_bound():
    wanted = noise(64, 512)
    wanted[9, 70] = 0
    result = wanted.clone()
    result[9, 70] = 0.9
    measured = compare(result, wanted, BOUND)
    assert measured.error < BOUND
    assert "the worst is y[9, 70] = 0.9, expected 0 of [64, 512]; it alone is wrong" in measured.failures[0]
    assert measured.worst > WORST * BOUND**0.5


def test_a_small_row_is_measured_against_itself():
    wanted = noise(64, 512)
    wanted[5] *= 1e-3
    assert found(wanted, put(5, 0.0)) == ["error"]


def test_a_row_of_zeros_is_measured_against_the_others():
    wanted = noise(64, 512)
    wanted[5] = 0
    assert found(wanted, put((5, 1), 1e-3)) == []
    assert found(wanted, put((5, 1), 1.0)) == ["error"]


def test_zeros_are_measured_against_one():
    wanted = torch.zeros(3, 64, dtype=torch.float64)
    assert found(wanted, put((0, 0), 1e-3)) == []
    assert found(wanted, put((0, 0), 0.5)) == ["error"]


@pytest.mark.parametrize("line", [(slice(None), 1000), (9, slice(None))], ids=["column", "row"])
def test_a_line_of_many_that_is_lost_is_seen(line):
    """Each of its elements is small enough for a bound as loose as 5e-3, and so is the whole."""
    wanted = noise(600, 1536)
    wanted[line].clamp_(-1.5, 1.5)
    result = wanted.clone()
    result[line] = 0
    (failure,) = compare(result, wanted, 5e-3).failures
    assert failure.startswith(f"error: {'column 1000' if line[1] == 1000 else 'row 9'} has NMSE 1")


@pytest.mark.parametrize(("off", "right"), [(1e-6, True), (1e-4, False)])
def test_a_row_of_one_element_that_is_most_of_all_is_measured_against_itself(off: float, right: bool):
    wanted = torch.full((354, 1), 1e-12, dtype=torch.float64)
    wanted[51] = 2e-8
    result = wanted.clone()
    result[51] *= 1 + off
    assert (compare(result, wanted, 1e-11).failures == ()) == right


def test_noise_within_the_bound_is_no_lost_line():
    wanted = noise(5, 4096)
    wanted[:, 7] *= 1e-3
    wanted[3] *= 1e4
    scale = wanted.square().mean(dim=-1, keepdim=True).sqrt()
    result = wanted + torch.randn(5, 4096, generator=torch.Generator().manual_seed(1)) * scale * BOUND**0.5 * 0.99
    assert compare(result, wanted, BOUND).failures == ()


def test_a_small_block_with_a_scale_of_its_own_is_measured_against_itself():
    wanted = noise(4, 64)
    wanted[2, 32:] *= 1e-6
    result = wanted.clone()
    result[2, 32:] = 0
    assert compare(result, wanted, BOUND).failures == ()
    assert compare(result, wanted, BOUND, block=32).failures


def test_a_peer_that_is_no_closer_raises_what_is_allowed():
    wanted = noise(64, 512)
    rough, far = wanted * 1.02, wanted.clone()
    far[9, 70] += 0.9
    for result in (rough, far):
        measured = compare(result, wanted, BOUND)
        assert measured.failures
        assert compare(result, wanted, BOUND, peer=(measured.error, measured.worst)).failures == ()
        assert compare(result, wanted, BOUND, peer=(measured.error / 2, measured.worst / 2)).failures


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_what_is_finite_must_be(number):
    assert found(noise(4, 64), put((2, 3), number)) == ["finite"]


@pytest.mark.parametrize("true", [torch.inf, -torch.inf])
def test_infinity_is_itself(true):
    wanted = noise(4, 64)
    wanted[1, 2] = true
    assert found(wanted, lambda result: None) == []
    for other in (-true, 0.0, torch.nan):
        assert found(wanted, put((1, 2), other)) == ["finite"], other


def test_nan_is_itself():
    wanted = noise(4, 64)
    wanted[1, 2] = torch.nan
    assert found(wanted, lambda result: None) == []
    assert found(wanted, put((1, 2), 0.0)) == ["finite"]


def test_beside_infinity_the_rest_is_measured():
    wanted = noise(4, 64)
    wanted[1, 2] = torch.inf
    assert found(wanted, put((3, 3), 9.0)) == ["error"]


def test_what_float32_hardware_may_flush_to_zero_is_no_error():
    assert found(torch.full((2, 64), 1e-40, dtype=torch.float64), lambda result: result.zero_()) == []


def test_a_result_in_a_narrow_type_is_measured_as_it_is():
    wanted = noise(4, 64)
    assert compare(wanted.bfloat16(), wanted, 1e-4).failures == ()
    assert compare(wanted.bfloat16(), wanted, 1e-7).failures


def test_a_narrow_row_of_a_batch_has_the_batch_s_scale():
    batch = torch.ones(64, 1, dtype=torch.float64)
    batch[-1] = 1e-3
    row = batch[-1:] + 1e-4
    assert compare(row, batch[-1:], 1e-6).failures
    assert compare(row, batch[-1:], 1e-6, batch=batch).failures == ()
    assert compare(batch[-1:] + 0.1, batch[-1:], 1e-6, batch=batch).failures


def test_a_wide_row_of_a_batch_has_its_own_scale():
    batch = torch.ones(64, 32, dtype=torch.float64)
    batch[-1] = 1e-3
    assert compare(batch[-1:] + 1e-4, batch[-1:], 1e-6, batch=batch).failures


def test_what_a_narrow_type_cannot_hold_is_infinite_in_it():
    wanted = torch.tensor([[1.0, 70_000.0, -70_000.0, 65_510.0]], dtype=torch.float64)
    right = torch.tensor([[1.0, torch.inf, -torch.inf, 65_504.0]], dtype=torch.float64)
    wrong = torch.tensor([[1.0, torch.inf, torch.inf, 65_504.0]], dtype=torch.float64)
    assert compare(right, wanted, BOUND, dtype=torch.float16).failures == ()
    assert compare(wrong, wanted, BOUND, dtype=torch.float16).failures[0].startswith("finite: ")
    assert compare(right, wanted, BOUND, dtype=torch.bfloat16).failures[0].startswith("finite: ")


def test_in_a_row_of_larger_numbers_near_is_what_its_elements_may_be_off_by():
    wanted = torch.tensor([[1e6, -64_000.0, 8.0]]).double()
    result = torch.tensor([[torch.inf, -torch.inf, 8.0]]).double()
    assert compare(result, wanted, BOUND, dtype=torch.float16).failures == ()
    assert compare(result, wanted, 1e-9, dtype=torch.float16).failures[0].startswith("finite: ")


@pytest.mark.parametrize("number", [65_504.0, torch.inf])
def test_near_the_largest_number_of_a_type_a_result_may_be_infinite_or_not(number):
    wanted, result = torch.tensor([[65_510.0, 1.0]]).double(), torch.tensor([[number, 1.0]]).double()
    assert compare(result, wanted, BOUND, dtype=torch.float16).failures == ()


def test_a_row_of_one_number_may_be_half_a_step_and_the_kernels_own_error_off():
    # Weighed by a softmax in bfloat16, 0.36927 is 0.3702 in each column, which is stored as 0.371094.
    wanted = torch.full((4, 64), 0.36927, dtype=torch.float64)
    found = torch.full((4, 64), 0.371094, dtype=torch.bfloat16)
    assert compare(found, wanted, 1e-5 + 2.6e-6, dtype=torch.bfloat16, precision=1e-5).failures == ()
    far = torch.full((4, 64), 0.375, dtype=torch.bfloat16)
    assert compare(far, wanted, 1e-5 + 2.6e-6, dtype=torch.bfloat16, precision=1e-5).failures
    uneven = wanted * torch.linspace(0.5, 1.5, 64)
    off = (uneven * 1.005).bfloat16()
    assert compare(off, uneven, 1e-5 + 2.6e-6, dtype=torch.bfloat16, precision=1e-5).failures
