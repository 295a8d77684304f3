"""convert: the same numbers in another format."""

import pytest
import torch

from kernelmux.conformance.testing import one_node
from kernelmux.errors import GraphError
from kernelmux.graph.formats import Value
from kernelmux.graph.ops import Operands


def test_the_reference_changes_no_number():
    x = torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    node = one_node("convert", Value("x", (3, 64)), format="bf16")
    (y,) = node.contract.reference(node, Operands((x,)))
    assert torch.equal(y, x)


def test_the_output_is_stored_as_asked():
    assert one_node("convert", Value("x", ("m", 64)), format="q8_32").outputs == (Value("node", ("m", 64), "q8_32"),)


def test_the_hook_is_told_both_formats():
    node = one_node("convert", Value("x", (3, 64), "bf16"), format="f16")
    assert node.contract.arguments(node) == {"m": 3, "n": 64, "source": "bf16", "target": "f16"}


def test_cost_of_a_hand_computed_example():
    node = one_node("convert", Value("x", (3, 64), "bf16"), format="q8_32")
    cost = node.contract.cost(node)
    assert (cost.flops, cost.nbytes) == (0, 3 * 64 * 2 + 3 * 64 + 2 * 3 * 2 * 4)


@pytest.mark.parametrize(
    ("x", "format"),
    [
        (Value("x", (3, 33)), "q8_32"),
        (Value("x", (3, 64)), "fp8_block"),
        (Value("x", (64,)), "bf16"),
        (Value("x", (2, 3, 64)), "bf16"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(x, format):
    with pytest.raises(GraphError, match="node"):
        one_node("convert", x, format=format)
