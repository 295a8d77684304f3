"""mul: element by element, in shape, cost and numbers."""

import pytest
import torch

from kernelmux.conformance.testing import one_node
from kernelmux.errors import GraphError
from kernelmux.graph.formats import Value
from kernelmux.graph.ops import Operands


def test_the_reference_is_the_elementwise_result():
    node = one_node("mul", Value("a", (2, 2)), Value("b", (2, 2)))
    a, b = [[1.0, -2.0], [0.5, 4.0]], [[3.0, 5.0], [-0.5, 0.25]]
    (y,) = node.contract.reference(node, Operands((torch.tensor(a).double(), torch.tensor(b).double())))
    assert y.tolist() == [[p * q for p, q in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]


def test_cost_of_a_hand_computed_example():
    node = one_node("mul", Value("a", (3, 8)), Value("b", (3, 8), "bf16"))
    cost = node.contract.cost(node)
    assert (cost.flops, cost.nbytes) == (24, 24 * 4 + 24 * 2 + 24 * 4)


def test_the_output_has_the_inputs_shape():
    assert one_node("mul", Value("a", ("m", 8)), Value("b", ("m", 8))).outputs == (Value("node", ("m", 8)),)


@pytest.mark.parametrize("other", [(3, 9), (4, 8), (1, 8), (8,)])
def test_shapes_that_differ_are_refused_by_name(other):
    with pytest.raises(GraphError, match=r"node \(mul\): a is \(3, 8\), b is"):
        one_node("mul", Value("a", (3, 8)), Value("b", other))


def test_rows_and_columns_are_needed():
    with pytest.raises(GraphError, match="node"):
        one_node("mul", Value("a", (3,)), Value("b", (3,)))
