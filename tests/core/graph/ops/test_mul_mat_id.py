"""mul_mat_id: each row by its experts' matrices, its cost, and what does not fit."""

import pytest
import torch

from kernelmux.conformance.testing import one_node
from kernelmux.errors import GraphError
from kernelmux.graph.formats import Value
from kernelmux.graph.ops import Operands

IDS = Value("ids", (2, 2), "i32")


def make(x, weight=(12, 5), format="f32", ids=IDS, bias=(), experts=3):
    biases = tuple(Value("b", shape) for shape in bias)
    weights = (Value("w", weight, format),)
    return one_node("mul_mat_id", Value("x", x), ids, weight=weights, bias=biases, experts=experts)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_reference_multiplies_each_row_by_its_experts(own, bias):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 10 if own else 5)
    x, w, b = (torch.randn(s, dtype=torch.float64, generator=generator) for s in (shape, (12, 5), (12,)))
    ids = [[2, 0], [1, 2]]
    node = make(shape, bias=[(12,)] if bias else [])
    (y,) = node.contract.reference(node, Operands((x, torch.tensor(ids)), (w,), (b,) if bias else ()))
    assert y.shape == (2, 8)
    for row in range(2):
        for place, expert in enumerate(ids[row]):
            read = x[row].view(-1, 5)[place if own else 0]
            wanted = w.view(3, 4, 5)[expert] @ read + (b.view(3, 4)[expert] if bias else 0)
            assert torch.allclose(y[row, 4 * place : 4 * place + 4], wanted)


def test_cost_counts_the_experts_that_rows_may_have():
    node = make((2, 64), (8 * 10, 64), "Q4_0", experts=8)
    cost = node.contract.cost(node)
    # Four of eight, at most.
    assert (cost.flops, cost.nbytes) == (2 * 4 * 10 * 64, (2 * 64 + 4 + 4 * 10) * 4 + 4 * 10 * 2 * 18)
    few = make((2, 64), (3 * 10, 64), "Q4_0", experts=3)
    assert few.contract.unread(few) == 0


def test_the_hook_is_told_the_extents_of_one_expert():
    node = make((2, 64), (80, 64), "Q4_0", experts=8)
    told = {"m": 2, "n": 10, "k": 64, "top_k": 2, "weight_format": "Q4_0", "bias": False, "experts": 8}
    assert node.contract.arguments(node) == told


@pytest.mark.parametrize(
    ("x", "changes"),
    [
        ((2, 6), {}),
        ((2, 15), {}),
        ((3, 5), {}),
        ((2, 5), {"weight": (13, 5)}),
        ((2, 5), {"weight": (3, 4, 5)}),
        ((2, 5), {"ids": Value("ids", (2, 2))}),
        ((2, 5), {"bias": [(4,)]}),
        ((2, 48), {"weight": (12, 48), "format": "Q4_0"}),
        ((2, 128), {"weight": (3 * 64, 128), "format": "fp8_128x128"}),
    ],
)
def test_what_does_not_fit_is_refused_by_name(x, changes):
    with pytest.raises(GraphError, match=r"node \(mul_mat_id\)"):
        make(x, **changes)
