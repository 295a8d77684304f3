"""expert_sum: a weighted sum of what lies side by side."""

import pytest
import torch

from kernelmux.conformance.testing import one_node
from kernelmux.errors import GraphError
from kernelmux.graph.formats import Value
from kernelmux.graph.ops import Operands


def test_the_reference_weighs_and_adds():
    node = one_node("expert_sum", Value("x", (2, 6)), Value("weights", (2, 2)))
    x = torch.arange(12, dtype=torch.float64).view(2, 6)
    weights = torch.tensor([[1.0, 10.0], [0.5, 0.0]], dtype=torch.float64)
    (y,) = node.contract.reference(node, Operands((x, weights)))
    assert y.tolist() == [[30.0, 41.0, 52.0], [3.0, 3.5, 4.0]]
    assert node.contract.arguments(node) == {"m": 2, "n": 3, "top_k": 2}


@pytest.mark.parametrize(("x", "weights"), [((2, 7), (2, 2)), ((2, 6), (3, 2)), ((2, 6), (2,))])
def test_what_does_not_fit_is_refused_by_name(x, weights):
    with pytest.raises(GraphError, match=r"node \(expert_sum\)"):
        one_node("expert_sum", Value("x", x), Value("weights", weights))
