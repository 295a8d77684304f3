"""route: the largest logits' experts, their weights, and ties."""

import pytest
import torch

from kernelmux.conformance.testing import one_node
from kernelmux.errors import GraphError
from kernelmux.graph.formats import Value
from kernelmux.graph.ops import Operands

LOGITS = torch.tensor([[0.0, 2.0, 1.0, 2.0], [3.0, -1.0, 0.0, 1.0]], dtype=torch.float64)


def routed(**fields):
    node = one_node("route", Value("logits", (2, 4)), **fields)
    return node.contract.reference(node, Operands((LOGITS,)))


def test_the_lower_of_equal_experts_comes_first():
    ids, _ = routed(top_k=3)
    assert ids.dtype == torch.int32
    assert ids.tolist() == [[1, 3, 2], [0, 3, 2]]


def test_weights_are_shares_of_all_experts():
    _, weights = routed(top_k=2)
    assert torch.allclose(weights, LOGITS.softmax(dim=-1).sort(descending=True).values[:, :2])


def test_renormalised_weights_add_up_to_one_before_they_are_scaled():
    _, plain = routed(top_k=2)
    _, weights = routed(top_k=2, renormalize=True, scale=2.5)
    assert torch.allclose(weights, 2.5 * plain / plain.sum(dim=-1, keepdim=True))


def test_sigmoids_are_each_chosen_logits_own():
    ids, weights = routed(top_k=2, sigmoid=True, scale=2.0)
    assert ids.tolist() == [[1, 3], [0, 3]]
    assert torch.allclose(weights, 2.0 * torch.tensor([[2.0, 2.0], [3.0, 1.0]], dtype=torch.float64).sigmoid())
    with pytest.raises(GraphError, match="weights are renormalised or sigmoids, not both"):
        routed(top_k=2, sigmoid=True, renormalize=True)


def test_the_hook_is_told_experts_and_how_many_are_chosen():
    node = one_node("route", Value("logits", (2, 4)), top_k=3)
    assert node.contract.arguments(node) == {"m": 2, "experts": 4, "top_k": 3, "renormalize": False, "sigmoid": False}
    assert [value.format for value in node.outputs] == ["i32", "f32"]


@pytest.mark.parametrize(("shape", "top_k"), [((2, 4), 5), ((2, 4), -1), ((4,), 1)])
def test_what_does_not_fit_is_refused_by_name(shape, top_k):
    with pytest.raises(GraphError, match=r"node \(route\)"):
        one_node("route", Value("logits", shape), top_k=top_k)
