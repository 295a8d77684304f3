"""embed: rows of a table by id, the table a weight or an activation."""

import pytest
import torch

from kernelmux.conformance.testing import one_node
from kernelmux.errors import GraphError
from kernelmux.graph.formats import Value
from kernelmux.graph.ops import Operands

IDS = torch.tensor([2, 0, 2], dtype=torch.int32)
TABLE = torch.arange(12, dtype=torch.float64).view(3, 4)
ROWS = [[8, 9, 10, 11], [0, 1, 2, 3], [8, 9, 10, 11]]


def test_rows_come_from_a_weight():
    node = one_node("embed", Value("ids", (3,), "i32"), weight=(Value("table", (3, 4)),))
    (y,) = node.contract.reference(node, Operands((IDS,), (TABLE,)))
    assert y.tolist() == ROWS


def test_rows_come_from_an_activation():
    node = one_node("embed", Value("ids", (3,), "i32"), Value("table", (3, 4)))
    (y,) = node.contract.reference(node, Operands((IDS, TABLE)))
    assert y.tolist() == ROWS


def test_there_are_as_many_rows_as_ids():
    node = one_node("embed", Value("ids", ("outs",), "i32"), Value("x", ("m", 4)))
    assert node.outputs[0].shape == ("outs", 4)


def test_cost_of_a_hand_computed_example():
    node = one_node("embed", Value("ids", (3,), "i32"), weight=(Value("table", (10, 32), "Q8_0"),))
    cost = node.contract.cost(node)
    assert (cost.flops, cost.nbytes) == (0, 3 * 4 + 3 * 34 + 3 * 32 * 4)


@pytest.mark.parametrize(
    ("ids", "tables", "weights"),
    [
        (Value("ids", (3,), "f32"), [], [(3, 4)]),
        (Value("ids", (3,), "i32"), [], []),
        (Value("ids", (3,), "i32"), [(3, 4)], [(3, 4)]),
        (Value("ids", (3,), "i32"), [(3,)], []),
        (Value("ids", (3,), "i32"), [], [(3, 4, 5)]),
        (Value("ids", (3, 2), "i32"), [], [(3, 4)]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(ids, tables, weights):
    with pytest.raises(GraphError, match=r"node \(embed\)"):
        one_node(
            "embed",
            ids,
            *(Value("t", shape) for shape in tables),
            weight=tuple(Value("w", shape) for shape in weights),
        )
