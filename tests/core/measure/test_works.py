"""Works: each kind of node once, with sequences that fill the rows, and what must be computed and moved."""

from __future__ import annotations

import pytest

from fake_backend import FakeKernel
from kernelmux.errors import KernelmuxError
from kernelmux.graph.graph import PAGE_SIZE, Graph
from kernelmux.measure.works import Batch, Work, matrix_work, model_works, stored_as
from kernelmux.models import open_random


@pytest.fixture(scope="module")
def graph() -> Graph:
    return open_random("tiny:bf16").graph


def one(graph: Graph, op: str, m: int, context: int = 100) -> Work:
    (work,) = model_works(graph, [op], m, context)
    return work


def test_alike_nodes_of_all_layers_are_one_work(graph: Graph):
    labels = [work.label for work in model_works(graph, ["mul_mat"], 1, 16)]
    assert labels == [
        "attn_q 256x256 bf16",
        "attn_k 128x256 bf16",
        "ffn_gate 512x256 bf16",
        "ffn_down 256x512 bf16",
    ]


def test_few_rows_decode_a_sequence_each_and_many_are_one_prompt(graph: Graph):
    assert one(graph, "attention", 5).batch == Batch(5, 1, 100)
    assert one(graph, "attention", 200).batch == Batch(1, 200, 200)


def test_the_state_of_a_batch_describes_its_sequences():
    length = PAGE_SIZE + 4
    state = Batch(2, 1, length).state()
    assert state["positions"] == [length - 1, length - 1]
    assert state["slots"] == [length - 1, 2 * PAGE_SIZE + length - 1]
    assert state["query_start"] == [0, 1, 2]
    assert state["kv_len"] == [length, length]
    assert state["block_table"] == [0, 1, 2, 3]


def test_fused_ops_are_found_where_they_would_stand(graph: Graph):
    assert [work.label for work in model_works(graph, ["swiglu"], 3, 16)] == ["ffn_silu+ffn_mul 3x512"]
    assert len(one(graph, "qkv", 3).node.weight) == 3


def test_conversions_reach_every_width_that_is_multiplied(graph: Graph):
    labels = [work.label for work in model_works(graph, ["convert"], 3, 16)]
    assert "256 to fp8_block" in labels
    assert "512 to q8_32" in labels


def test_attention_counts_what_a_causal_mask_leaves(graph: Graph):
    width = 256
    assert one(graph, "attention", 200).flops == 4 * width * 200 * 201 // 2
    assert one(graph, "attention", 5).flops == 4 * width * 100 * 5


def test_of_tables_and_caches_only_the_rows_used_are_moved(graph: Graph):
    copy = one(graph, "copy", 3)
    assert copy.nbytes(copy.node) == 3 * 4 + 2 * 3 * 128 * 4 + 2 * 3 * 128 * 4
    (lookup, _) = model_works(graph, ["embed"], 3, 16)
    assert lookup.nbytes(lookup.node) == 3 * 4 + 3 * 256 * 2 + 3 * 256 * 4


def test_a_matrix_of_any_size_is_a_mul_mat():
    work = matrix_work(96, 512, "q4_k", 7)
    assert work.label == "96x512 Q4_K"
    assert work.flops == 2 * 7 * 96 * 512
    assert work.nbytes(work.node) == 96 * 512 // 256 * 144 + 7 * 512 * 4 + 7 * 96 * 4


def test_an_unknown_op_is_told_the_nearest(graph: Graph):
    with pytest.raises(KernelmuxError, match="did you mean 'rms_norm'"):
        list(model_works(graph, ["rmsnorm"], 1, 16))


def test_activations_are_stored_as_preferred_where_the_kernel_can():
    node = matrix_work(16, 32, "bf16", 1).node
    both = FakeKernel(takes=["f32", "bf16"], emits=["f32", "bf16"])
    assert [v.format for v in (*stored_as(node, both, "bf16").inputs, *stored_as(node, both, "bf16").outputs)] == [
        "bf16",
        "bf16",
    ]
    only = FakeKernel(takes=["fp8_row"], emits=["f16"])
    found = stored_as(node, only, "bf16")
    assert (found.inputs[0].format, found.outputs[0].format) == ("fp8_row", "f16")
