"""silu: against the definition by the sigmoid, and at the ends of the number range."""

import pytest
import torch

from kernelmux.conformance.testing import one_node
from kernelmux.errors import GraphError
from kernelmux.graph.formats import Value
from kernelmux.graph.ops import Operands


def _silu(x):
    node = one_node("silu", Value("x", tuple(x.shape)))
    (y,) = node.contract.reference(node, Operands((x,)))
    return y


def test_the_reference_agrees_with_torch():
    x = torch.randn(4, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    torch.testing.assert_close(_silu(x), torch.nn.functional.silu(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_are_zero_or_the_input_never_nan(dtype):
    x = torch.tensor([[-3e38, -1e4, -750.0, 0.0, 750.0, 1e4, 3e38]], dtype=dtype)
    y = _silu(x)
    assert not y.isnan().any()
    assert (y[:, :4] == 0).all()
    assert torch.equal(y[:, 4:], x[:, 4:])


def test_cost_of_a_hand_computed_example():
    node = one_node("silu", Value("x", (2, 16)))
    cost = node.contract.cost(node)
    assert (cost.flops, cost.nbytes) == (4 * 32, 2 * 32 * 4)


def test_rows_and_columns_are_needed():
    with pytest.raises(GraphError, match="node"):
        one_node("silu", Value("x", (16,)))
