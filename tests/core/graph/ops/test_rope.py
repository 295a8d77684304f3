"""rope: turns, stated as rotation matrices and as complex numbers; what scaling does to the frequencies."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelmux.conformance.testing import one_node
from kernelmux.errors import GraphError
from kernelmux.graph.formats import Value
from kernelmux.graph.ops import Operands, Rotation

DIM = 8
HEADS = {"num_heads": 2, "num_kv_heads": 1, "head_dim": DIM}
BOTH = pytest.mark.parametrize("pairing", ["adjacent", "halves"])


def _values(m, q=2 * DIM, k=DIM, positions=None):
    shape = (m,) if positions is None else positions
    return Value("q", (m, q)), Value("k", (m, k)), Value("positions", shape, "i32")


def _rope(q, k, positions, rotation, divisors=None):
    fields = {} if divisors is None else {"weight": (Value("divisors", (rotation.dims // 2,)),)}
    node = one_node("rope", *_values(len(q)), rotation=rotation, **HEADS, **fields)
    at = torch.tensor(positions, dtype=torch.int32)
    return node.contract.reference(node, Operands((q, k, at), () if divisors is None else (divisors,)))


def _noise(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _matrix(position, rotation):
    """The turn of a whole head at a position, as a matrix."""
    matrix = torch.eye(DIM, dtype=torch.float64)
    for pair in range(rotation.dims // 2):
        adjacent = rotation.pairing == "adjacent"
        i, j = (2 * pair, 2 * pair + 1) if adjacent else (pair, pair + rotation.dims // 2)
        angle = position * rotation.theta ** (-2 * pair / rotation.dims)
        matrix[i, i] = matrix[j, j] = math.cos(angle)
        matrix[i, j], matrix[j, i] = -math.sin(angle), math.sin(angle)
    return matrix


@BOTH
@pytest.mark.parametrize("dims", [DIM, 4])
def test_every_head_is_multiplied_by_a_rotation_matrix(pairing, dims):
    rotation = Rotation(theta=100.0, dims=dims, pairing=pairing)
    q, k, positions = _noise(3, 2 * DIM), _noise(3, DIM, seed=1), [0, 5, 1000]
    for rows, turned in zip((q, k), _rope(q, k, positions, rotation), strict=True):
        expected = [row.view(-1, DIM) @ _matrix(p, rotation).T for row, p in zip(rows, positions, strict=True)]
        torch.testing.assert_close(turned, torch.stack(expected).flatten(1))


def test_adjacent_pairs_are_complex_numbers_turned():
    q, k = _noise(4, 2 * DIM), _noise(4, DIM, seed=1)
    rotation = Rotation(theta=1e4, dims=DIM)
    turn = torch.outer(torch.arange(7, 11).double(), 1e4 ** (-torch.arange(0, DIM, 2) / DIM).double())
    expected = torch.view_as_complex(q.view(4, 2, DIM // 2, 2)) * torch.polar(torch.ones_like(turn), turn).unsqueeze(1)
    turned, _ = _rope(q, k, [7, 8, 9, 10], rotation)
    torch.testing.assert_close(turned, torch.view_as_real(expected).flatten(1))


@BOTH
@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    first=st.integers(0, 4000), apart=st.integers(0, 4000), shift=st.integers(0, 100_000), seed=st.integers(0, 2**31)
)
def test_dot_products_depend_only_on_the_difference_of_positions(pairing, first, apart, shift, seed):
    rotation = Rotation(theta=1e4, dims=DIM, pairing=pairing)
    q, k = _noise(1, 2 * DIM, seed=seed), _noise(1, DIM, seed=seed + 1)

    def dot(query_at, key_at):
        turned_q, _ = _rope(q, k, [query_at], rotation)
        _, turned_k = _rope(q, k, [key_at], rotation)
        return turned_q.view(2, DIM) @ turned_k.view(DIM)

    torch.testing.assert_close(dot(first + apart, first), dot(first + apart + shift, first + shift))


@BOTH
def test_position_zero_changes_nothing(pairing):
    q, k = _noise(1, 2 * DIM), _noise(1, DIM, seed=1)
    turned = _rope(q, k, [0], Rotation(theta=1e4, dims=DIM, pairing=pairing))
    assert torch.equal(turned[0], q)
    assert torch.equal(turned[1], k)


def test_linear_scaling_divides_positions():
    q, k = _noise(2, 2 * DIM), _noise(2, DIM, seed=1)
    scaled = _rope(q, k, [8, 400], Rotation(theta=1e4, dims=DIM, scaling="linear", factor=4.0))
    plain = _rope(q, k, [2, 100], Rotation(theta=1e4, dims=DIM))
    torch.testing.assert_close(scaled, plain)


def test_divisors_divide_the_frequencies():
    q, k = _noise(1, 2 * DIM), _noise(1, DIM, seed=1)
    rotation = Rotation(theta=1e4, dims=DIM)
    turned = _rope(q, k, [12], rotation, divisors=torch.full((DIM // 2,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(turned, _rope(q, k, [4], rotation))


def test_llama3_scaling_is_that_of_its_published_code():
    rotation = Rotation(theta=5e5, dims=128, scaling="llama3", factor=8.0, original_context=8192)
    for frequency, pair in zip(rotation.frequencies(), range(64), strict=True):
        plain = 5e5 ** (-2 * pair / 128)
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / 4:
            expected = plain
        elif wavelength > 8192:
            expected = plain / 8
        else:
            smooth = (8192 / wavelength - 1) / 3
            expected = (1 - smooth) * plain / 8 + smooth * plain
        assert frequency == pytest.approx(expected, rel=1e-12)


def test_yarn_keeps_fast_pairs_slows_slow_ones_and_sharpens_attention():
    rotation = Rotation(theta=1e4, dims=128, scaling="yarn", factor=4.0, original_context=4096)
    ratios = [
        frequency / 1e4 ** (-2 * pair / 128) for frequency, pair in zip(rotation.frequencies(), range(64), strict=True)
    ]
    turns = [4096 * 1e4 ** (-2 * pair / 128) / (2 * math.pi) for pair in range(64)]
    assert all(ratio == pytest.approx(1) for ratio, count in zip(ratios, turns, strict=True) if count > 33)
    assert all(ratio == pytest.approx(0.25) for ratio, count in zip(ratios, turns, strict=True) if count < 0.85)
    assert all(left >= right - 1e-12 for left, right in itertools.pairwise(ratios))
    assert rotation.magnitude == pytest.approx(1 + 0.1 * math.log(4))
    q, k = _noise(1, 2 * DIM), _noise(1, DIM, seed=1)
    small = Rotation(theta=1e4, dims=DIM, scaling="yarn", factor=4.0, original_context=4096)
    turned, _ = _rope(q, k, [9], small)
    assert float(turned.norm() / q.norm()) == pytest.approx(small.magnitude)


def test_yarn_blends_between_fractions_of_pairs_unless_truncated():
    """gpt-oss's numbers: 64 dims, base 150,000, 32 times 4096 positions."""
    rotation = Rotation(theta=1.5e5, dims=64, scaling="yarn", factor=32.0, original_context=4096, truncate=False)
    low, high = (64 * math.log(4096 / (turns * 2 * math.pi)) / (2 * math.log(1.5e5)) for turns in (32, 1))
    for pair, frequency in enumerate(rotation.frequencies()):
        slowed = min(max((pair - low) / (high - low), 0.0), 1.0)
        plain = 1.5e5 ** (-2 * pair / 64)
        assert frequency == pytest.approx(plain * (1 - slowed) + plain / 32 * slowed, rel=1e-12)
    assert rotation.frequencies() != replace(rotation, truncate=True).frequencies()


def test_cost_of_a_hand_computed_example():
    node = one_node("rope", *_values(3), rotation=Rotation(theta=1e4, dims=DIM), **HEADS)
    cost = node.contract.cost(node)
    assert (cost.flops, cost.nbytes) == (3 * 3 * 24, 2 * 3 * 24 * 4 + 3 * 4)


@pytest.mark.parametrize(
    ("values", "dims", "divisors"),
    [
        (_values(3, q=DIM), DIM, []),
        (_values(3, k=2 * DIM), DIM, []),
        (_values(3, positions=(4,)), DIM, []),
        (_values(3, positions=(3, 1)), DIM, []),
        (_values(3), 3, []),
        (_values(3), DIM + 2, []),
        (_values(3), DIM, [(DIM,)]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(values, dims, divisors):
    weight = tuple(Value("divisors", shape) for shape in divisors)
    with pytest.raises(GraphError, match=r"node \(rope\)"):
        one_node("rope", *values, rotation=Rotation(theta=1e4, dims=dims), weight=weight, **HEADS)


def test_keys_have_as_many_rows_as_queries():
    q, _, positions = _values(3)
    with pytest.raises(GraphError, match=r"node \(rope\)"):
        one_node("rope", q, Value("k", (5, DIM)), positions, rotation=Rotation(theta=1e4, dims=DIM), **HEADS)
