"""mul_mat: x Wᵀ + b, its cost, and weights that do not fit."""

import pytest
import torch

from kernelmux.conformance.testing import one_node
from kernelmux.errors import GraphError
from kernelmux.graph.formats import Value
from kernelmux.graph.ops import Operands


@pytest.mark.parametrize("bias", [False, True])
def test_the_reference_is_a_sum_of_products(bias):
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((3, 5), (4, 5), (4,)))
    fields = {"weight": (Value("w", (4, 5)),), **({"bias": (Value("b", (4,)),)} if bias else {})}
    node = one_node("mul_mat", Value("x", (3, 5)), **fields)
    (y,) = node.contract.reference(node, Operands((x,), (w,), (b,) if bias else ()))
    for row in range(3):
        for out in range(4):
            expected = sum(float(x[row, i] * w[out, i]) for i in range(5)) + (float(b[out]) if bias else 0)
            assert float(y[row, out]) == pytest.approx(expected, rel=1e-12)


def test_cost_counts_the_weight_as_it_is_stored():
    node = one_node("mul_mat", Value("x", (2, 64)), weight=(Value("w", (10, 64), "Q4_0"),))
    cost = node.contract.cost(node)
    assert (cost.flops, cost.nbytes) == (2 * 2 * 10 * 64, 2 * 64 * 4 + 10 * 2 * 18 + 2 * 10 * 4)


def test_the_hook_is_told_m_n_k_and_format():
    node = one_node("mul_mat", Value("x", (2, 64)), weight=(Value("w", (10, 64), "Q4_0"),))
    assert node.contract.arguments(node) == {"m": 2, "n": 10, "k": 64, "weight_format": "Q4_0", "bias": False}


@pytest.mark.parametrize(
    ("x", "weights", "bias"),
    [
        ((2, 64), [((10, 32), "f32")], []),
        ((2, 64), [((64,), "f32")], []),
        ((64,), [((10, 64), "f32")], []),
        ((2, 1, 64), [((10, 64), "f32")], []),
        ((2, 48), [((10, 48), "Q4_0")], []),
        ((2, 64), [((10, 64), "Q4_K")], []),
        ((2, 64), [((10, 64), "f32"), ((10, 64), "f32")], []),
        ((2, 64), [], []),
        ((2, 64), [((10, 64), "f32")], [(11,)]),
        ((2, 64), [((10, 64), "f32")], [(1, 10)]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(x, weights, bias):
    fields = {
        "weight": tuple(Value(f"w{index}", *stored) for index, stored in enumerate(weights)),
        "bias": tuple(Value("b", shape) for shape in bias),
    }
    with pytest.raises(GraphError, match=r"node \(mul_mat\)"):
        one_node("mul_mat", Value("x", x), **fields)
