"""rms_norm: unit root mean square, whatever the row's scale; epsilon for rows near zero."""

import pytest
import torch

from kernelmux.conformance.testing import one_node
from kernelmux.errors import GraphError
from kernelmux.graph.formats import Value
from kernelmux.graph.ops import Operands


def _norm(x, gamma, epsilon=1e-6):
    node = one_node(
        "rms_norm", Value("x", tuple(x.shape)), gamma=(Value("gamma", tuple(gamma.shape)),), epsilon=epsilon
    )
    (y,) = node.contract.reference(node, Operands((x,), gamma=(gamma,)))
    return y


def _noise(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_reference_agrees_with_torch():
    x, gamma = _noise(5, 48), _noise(48)
    torch.testing.assert_close(_norm(x, gamma), torch.nn.functional.rms_norm(x, (48,), gamma, 1e-6))


@pytest.mark.parametrize("scale", [1e-2, 3.0, 1e6])
def test_a_scaled_row_is_normed_alike(scale):
    x, gamma = _noise(3, 64), _noise(64)
    torch.testing.assert_close(_norm(x * scale, gamma, 1e-20), _norm(x, gamma, 1e-20))


def test_rows_have_unit_root_mean_square():
    y = _norm(_noise(4, 100) * 7, torch.ones(100, dtype=torch.float64), 1e-20)
    torch.testing.assert_close(y.square().mean(dim=-1), torch.ones(4, dtype=torch.float64))


def test_epsilon_keeps_zeros_zero_and_damps_tiny_rows():
    gamma = torch.ones(4, dtype=torch.float64)
    assert (_norm(torch.zeros(2, 4, dtype=torch.float64), gamma) == 0).all()
    y = _norm(torch.full((1, 4), 1e-3, dtype=torch.float64), gamma, epsilon=3e-6)
    torch.testing.assert_close(y, torch.full((1, 4), 0.5, dtype=torch.float64))


def test_cost_of_a_hand_computed_example():
    node = one_node("rms_norm", Value("x", (2, 16)), gamma=(Value("gamma", (16,)),), epsilon=1e-5)
    cost = node.contract.cost(node)
    assert (cost.flops, cost.nbytes) == (4 * 32, 32 * 4 + 16 * 4 + 32 * 4)


@pytest.mark.parametrize(
    ("x", "gammas", "epsilon"),
    [
        ((2, 16), [(15,)], 1e-5),
        ((2, 16), [(1, 16)], 1e-5),
        ((2, 16), [(16,)], -1e-5),
        ((2, 16), [(16,)], 0.0),
        ((2, 16), [], 1e-5),
        ((2, 16), [(16,), (16,)], 1e-5),
        ((16,), [(16,)], 1e-5),
    ],
)
def test_what_does_not_fit_is_refused_by_name(x, gammas, epsilon):
    weights = tuple(Value(f"gamma{index}", shape) for index, shape in enumerate(gammas))
    with pytest.raises(GraphError, match=r"node \(rms_norm\)"):
        one_node("rms_norm", Value("x", x), gamma=weights, epsilon=epsilon)
