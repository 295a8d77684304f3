"""What measured times say of nodes: those that were measured, other sizes, and row counts in between."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_backend import FakeKernel
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import make_node
from kernelmux.measure.times import Known, family, look_up, size, written
from kernelmux.models import open_random

KERNEL = FakeKernel("dp4a", packed_bytes=80)
TIMES = {"mul_mat dp4a": {"16x8x5.0": {"1": 2.0, "4": 4.0, "16": 32.0}, "1024x512x5.0": {"1": 300.0}}}


def node(n=16, k=8):
    return make_node("mul_mat", "y", Value("x", (1, k)), weight=(Value("w", (n, k), "f32"),))


def test_a_node_is_known_by_op_and_kernel_and_by_its_sizes_as_packed():
    assert family(KERNEL, node()) == "mul_mat dp4a"
    assert written(size(KERNEL, node(), 512)) == "16x8x5.0"
    # How the file stores the weight counts only where the kernel packs nothing.
    assert written(size(FakeKernel(), node(), 512)) == "16x8x32.0"


@pytest.mark.parametrize(("rows", "us"), [(1, 2.0), (4, 4.0), (16, 32.0), (2, 2**1.5), (64, 32.0)])
def test_row_counts_between_two_are_interpolated_and_beyond_all_is_told_of_what_it_is(rows, us):
    found = look_up(TIMES, KERNEL, node(), rows, 512)
    assert found == Known(pytest.approx(us), rows=16 if rows > 16 else 0)


def test_another_size_is_in_proportion_to_the_nearest_and_says_which():
    found = look_up(TIMES, FakeKernel("dp4a", packed_bytes=160), node(32, 8), 1, 512)
    assert found == Known(pytest.approx(4.0), "16x8x5.0")


def test_a_size_that_was_measured_at_such_row_counts_tells_more_than_the_very_size_that_was_not():
    """Times of two rows say little of a thousand."""
    times = {"mul_mat dp4a": {"16x8x5.0": {"1": 2.0, "2": 4.0}, "32x8x5.0": {"1": 3.0, "2048": 10.0}}}
    assert look_up(times, KERNEL, node(), 2048, 512) == Known(pytest.approx(5.0), "32x8x5.0")
    assert look_up(times, KERNEL, node(), 2, 512) == Known(pytest.approx(4.0))


def test_attention_of_half_the_heads_takes_half_the_time():
    attention = next(node for node in open_random("tiny:bf16").graph.ops if node.op == "attention")
    attention = replace(attention, num_heads=8, num_kv_heads=4)
    times = {family(KERNEL, attention): {"16x8x512": {"1": 8.0}}}
    assert look_up(times, KERNEL, attention, 1, 512).us == pytest.approx(4.0)


def test_what_was_never_measured_is_not_known():
    assert look_up(TIMES, FakeKernel("other"), node(), 1, 512) is None
    assert look_up({}, KERNEL, node(), 1, 512) is None


@given(st.dictionaries(st.integers(1, 4096), st.floats(0.1, 1e4), min_size=1), st.integers(1, 8192))
def test_between_two_measurements_the_time_is_between_them(by_rows, rows):
    times = {"mul_mat dp4a": {"16x8x5.0": {str(count): us for count, us in by_rows.items()}}}
    us = look_up(times, KERNEL, node(), rows, 512).us
    below = [by_rows[count] for count in sorted(by_rows) if count <= rows][-1:]
    above = [by_rows[count] for count in sorted(by_rows) if count >= rows][:1]
    if below and above:
        assert min(*below, *above) * 0.999 <= us <= max(*below, *above) * 1.001
    else:
        assert us == pytest.approx((above or below)[0])
