"""attention: against torch on contiguous data, and against a loop over every query and key."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kernelmux.conformance.testing import one_node
from kernelmux.errors import GraphError
from kernelmux.graph.formats import Value
from kernelmux.graph.ops import Operands

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 8, 4
FIELDS = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "scale": DIM**-0.5}


def _values(m=5, seqs=1, width=2, q_width=HEADS * DIM, cache=(9, PAGE, KV_HEADS, DIM)):
    return (
        Value("q", (m, q_width)),
        Value("k_cache", cache),
        Value("v_cache", cache),
        Value("query_start", (seqs + 1,), "i32"),
        Value("kv_len", (seqs,), "i32"),
        Value("block_table", (seqs, width), "i32"),
    )


def _ints(rows):
    return torch.tensor(rows, dtype=torch.int32)


def _noise(seed, *shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _attention(q, caches, starts, lengths, table, sinks=None, **fields):
    weight = () if sinks is None else (Value("sinks", (HEADS,)),)
    node = one_node("attention", *_values(len(q), len(lengths), len(table[0])), weight=weight, **{**FIELDS, **fields})
    operands = Operands((q, *caches, _ints(starts), _ints(lengths), _ints(table)), () if sinks is None else (sinks,))
    (y,) = node.contract.reference(node, operands)
    return y


def _by_hand(q, rows, window=0, soft_cap=0.0, scale=FIELDS["scale"], sinks=None, chunk=0):
    """q [rows, heads * dim] against the cached rows [length, kv_heads, dim] of one sequence, one score at a time."""
    keys, values = rows
    length, count = len(keys), len(q)
    y = torch.zeros(count, HEADS, DIM, dtype=torch.float64)
    for row in range(count):
        position = length - count + row
        for head in range(HEADS):
            kv_head = head * KV_HEADS // HEADS
            seen = [p for p in range(length) if p <= position and (not window or position - p < window)]
            seen = [p for p in seen if not chunk or p // chunk == position // chunk]
            scores = [scale * float(q[row].view(HEADS, DIM)[head] @ keys[p, kv_head]) for p in seen]
            if soft_cap:
                scores = [soft_cap * math.tanh(score / soft_cap) for score in scores]
            total = sum(map(math.exp, scores)) + (0.0 if sinks is None else math.exp(sinks[head]))
            for p, score in zip(seen, scores, strict=True):
                y[row, head] += math.exp(score) / total * values[p, kv_head]
    return y.flatten(1)


def _cached(caches, pages, length):
    return [cache[pages].flatten(0, 1)[:length] for cache in caches]


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 8), (8, 8), (3, 7)])
def test_contiguous_pages_agree_with_torch(rows, length):
    q, caches = _noise(0, rows, HEADS * DIM), (_noise(1, 9, PAGE, KV_HEADS, DIM), _noise(2, 9, PAGE, KV_HEADS, DIM))
    y = _attention(q, caches, [0, rows], [length], [[0, 1]])
    keys, values = (part.transpose(0, 1)[None] for part in _cached(caches, [0, 1], length))
    mask = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
    heads = q.view(rows, HEADS, DIM).transpose(0, 1)[None]
    expected = scaled_dot_product_attention(heads, keys, values, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(y, expected[0].transpose(0, 1).flatten(1))


@pytest.mark.parametrize("window", [0, 1, 3, 100])
@pytest.mark.parametrize("soft_cap", [0.0, 0.5, 30.0])
def test_sequences_of_a_batch_read_their_own_pages(window, soft_cap):
    q, caches = _noise(0, 6, HEADS * DIM), (_noise(1, 9, PAGE, KV_HEADS, DIM), _noise(2, 9, PAGE, KV_HEADS, DIM))
    table, lengths = [[7, 2, 0], [3, 0, 0], [8, 1, 5]], [9, 2, 12]
    y = _attention(q, caches, [0, 3, 5, 6], lengths, table, window=window, soft_cap=soft_cap)
    for seq, rows in enumerate((slice(0, 3), slice(3, 5), slice(5, 6))):
        cached = _cached(caches, table[seq], lengths[seq])
        torch.testing.assert_close(y[rows], _by_hand(q[rows], cached, window, soft_cap))


def test_the_scale_is_the_nodes_own():
    q, caches = _noise(0, 2, HEADS * DIM), (_noise(1, 9, PAGE, KV_HEADS, DIM), _noise(2, 9, PAGE, KV_HEADS, DIM))
    y = _attention(q, caches, [0, 2], [5], [[4, 6]], scale=2.0)
    torch.testing.assert_close(y, _by_hand(q, _cached(caches, [4, 6], 5), scale=2.0))


@pytest.mark.parametrize("fields", [{"chunk": 1}, {"chunk": 2}, {"chunk": 4}, {"chunk": 3, "window": 2}])
def test_rows_see_their_own_chunk(fields):
    q, caches = _noise(0, 4, HEADS * DIM), (_noise(1, 9, PAGE, KV_HEADS, DIM), _noise(2, 9, PAGE, KV_HEADS, DIM))
    y = _attention(q, caches, [0, 4], [7], [[4, 6]], **fields)
    torch.testing.assert_close(y, _by_hand(q, _cached(caches, [4, 6], 7), **fields))


@pytest.mark.parametrize("fields", [{}, {"window": 3}, {"window": 2, "soft_cap": 0.5}])
def test_sinks_take_a_share_of_their_heads(fields):
    q, caches = _noise(0, 4, HEADS * DIM), (_noise(1, 9, PAGE, KV_HEADS, DIM), _noise(2, 9, PAGE, KV_HEADS, DIM))
    sinks = torch.tensor([-1.0, 0.0, 2.5, 40.0], dtype=torch.float64)
    y = _attention(q, caches, [0, 3, 4], [6, 0], [[4, 6], [0, 0]], sinks=sinks, **fields)
    torch.testing.assert_close(y[:3], _by_hand(q[:3], _cached(caches, [4, 6], 6), sinks=sinks.tolist(), **fields))
    assert (y[3:] == 0).all()


def test_sinks_of_other_heads_are_refused_by_name():
    with pytest.raises(GraphError, match=r"sinks is \(3,\); sinks are one for each of 4 heads"):
        one_node("attention", *_values(), weight=(Value("sinks", (3,)),), **FIELDS)


def test_padding_rows_and_empty_sequences_are_zeros():
    q, caches = _noise(0, 6, HEADS * DIM), (_noise(1, 9, PAGE, KV_HEADS, DIM), _noise(2, 9, PAGE, KV_HEADS, DIM))
    # Rows: one of a sequence, none of an empty one, two of a sequence of length 0, three of no sequence.
    y = _attention(q, caches, [0, 1, 1, 3], [4, 0, 0], [[5], [0], [0]])
    torch.testing.assert_close(y[:1], _by_hand(q[:1], _cached(caches, [5], 4)))
    assert (y[1:] == 0).all()


def test_what_lies_beyond_a_sequence_does_not_matter():
    q, caches = _noise(0, 1, HEADS * DIM), [_noise(1, 9, PAGE, KV_HEADS, DIM), _noise(2, 9, PAGE, KV_HEADS, DIM)]
    before = _attention(q, caches, [0, 1], [5], [[0, 1]])
    for cache in caches:
        cache[1, 1:] = math.nan
        cache[2:] = math.nan
    assert torch.equal(_attention(q, caches, [0, 1], [5], [[0, 1]]), before)


def test_cost_of_a_hand_computed_example():
    node = one_node("attention", *_values(m=5), **FIELDS)
    cost = node.contract.cost(node)
    cache = 9 * PAGE * KV_HEADS * DIM
    assert cost.flops == 4 * 5 * HEADS * DIM * 9 * PAGE
    assert cost.nbytes == 4 * (2 * 5 * HEADS * DIM + 2 * cache + 2 + 1 + 2)


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"q_width": HEADS * DIM + 1}, {}),
        ({"cache": (9, PAGE, KV_HEADS * DIM)}, {}),
        ({"cache": (9, PAGE, HEADS, DIM)}, {}),
        ({"cache": (9, PAGE, KV_HEADS, DIM + 1)}, {}),
        ({}, {"num_kv_heads": 3}),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, fields):
    with pytest.raises(GraphError, match=r"node \(attention\)"):
        one_node("attention", *_values(**changes), **{**FIELDS, **fields})


@pytest.mark.parametrize(
    ("port", "shape"), [("query_start", (2, 1)), ("kv_len", (3,)), ("block_table", (1,)), ("block_table", (3, 2))]
)
def test_a_batch_whose_lengths_do_not_go_together_is_refused_by_name(port, shape):
    values = [Value(port, shape, "i32") if value.name == port else value for value in _values()]
    with pytest.raises(GraphError, match=r"node \(attention\)"):
        one_node("attention", *values, **FIELDS)
