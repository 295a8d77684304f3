"""copy: rows to their slots, padding rows nowhere."""

import pytest
import torch

from kernelmux.conformance.testing import one_node
from kernelmux.errors import GraphError
from kernelmux.graph.formats import Value
from kernelmux.graph.ops import Operands

FIELDS = {"num_kv_heads": 2, "head_dim": 4}


def _values(m=3, width=8, slots=None, cache=(4, 2, 2, 4)):
    rows = [Value(name, (m, width)) for name in ("k", "v")]
    caches = [Value(name, cache) for name in ("k_cache", "v_cache")]
    return (*rows, Value("slots", (m,) if slots is None else slots, "i32"), *caches)


def _copy(slots):
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(len(slots), 8, dtype=torch.float64, generator=generator) for _ in "kv")
    caches = [torch.randn(4, 2, 2, 4, dtype=torch.float64, generator=generator) for _ in "kv"]
    node = one_node("copy", *_values(len(slots)), **FIELDS)
    before = [cache.clone() for cache in caches]
    operands = Operands((k, v, torch.tensor(slots, dtype=torch.int32), *caches))
    return (k, v), before, node.contract.reference(node, operands)


@pytest.mark.parametrize("slots", [[0, 1, 2], [7, 3, 0], [5, -1, 2], [-1, -1, -1]])
def test_rows_go_to_their_slots_and_nowhere_else(slots):
    rows, before, after = _copy(slots)
    for given, old, new in zip(rows, before, after, strict=True):
        expected = old.clone()
        for row, slot in enumerate(slots):
            if slot >= 0:
                expected[slot // 2, slot % 2] = given[row].view(2, 4)
        assert torch.equal(new, expected)


def test_the_outputs_are_the_caches_in_their_own_format():
    caches = [Value(name, ("pages", 16, 2, 4), "f16") for name in ("k_cache", "v_cache")]
    node = one_node("copy", *_values("m")[:3], *caches, **FIELDS)
    assert [(value.name, value.shape, value.format) for value in node.outputs] == [
        ("node.k_cache", ("pages", 16, 2, 4), "f16"),
        ("node.v_cache", ("pages", 16, 2, 4), "f16"),
    ]


def test_cost_of_a_hand_computed_example():
    node = one_node("copy", *_values(), **FIELDS)
    cost = node.contract.cost(node)
    assert (cost.flops, cost.nbytes) == (0, 2 * 3 * 8 * 4 + 3 * 4 + 4 * 64 * 4)


@pytest.mark.parametrize(
    "changes",
    [{"width": 9}, {"slots": (4,)}, {"cache": (4, 2, 8)}, {"cache": (4, 2, 4, 2)}, {"cache": (4, 2, 2, 5)}],
)
def test_what_does_not_fit_is_refused_by_name(changes):
    with pytest.raises(GraphError, match=r"node \(copy\)"):
        one_node("copy", *_values(**changes), **FIELDS)


def test_keys_and_values_have_as_many_rows():
    k, _, slots, *caches = _values()
    with pytest.raises(GraphError, match=r"node \(copy\)"):
        one_node("copy", k, Value("v", (5, 8)), slots, *caches, **FIELDS)
