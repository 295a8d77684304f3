"""temper: against the definition row by row, and what does not go together."""

import math

import pytest
import torch

from kernelmux.conformance.testing import one_node
from kernelmux.errors import GraphError
from kernelmux.graph.formats import Value
from kernelmux.graph.ops import Operands


def test_rows_grow_with_each_span():
    x = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 6, 7, 8, 14, 15, 100_000], dtype=torch.int32)
    node = one_node("temper", Value("x", (7, 5)), Value("positions", (7,), "i32"), scale=0.5, span=8)
    (y,) = node.contract.reference(node, Operands((x, positions)))
    factors = [1 + 0.5 * math.log(1 + count) for count in (0, 0, 1, 1, 1, 2, 12_500)]
    torch.testing.assert_close(y, x * torch.tensor(factors, dtype=torch.float64).unsqueeze(1))


@pytest.mark.parametrize(
    ("positions", "fields", "message"),
    [
        (Value("positions", (3,), "i32"), {"scale": 0.1, "span": 8}, r"positions must be i32 \(4,\)"),
        (Value("positions", (4,)), {"scale": 0.1, "span": 8}, "positions is f32"),
        (Value("positions", (4,), "i32"), {"scale": -0.1, "span": 8}, "scale and span must be above 0"),
    ],
)
def test_what_does_not_go_together_is_refused(positions, fields, message):
    with pytest.raises(GraphError, match=message):
        one_node("temper", Value("x", (4, 6)), positions, **fields)
