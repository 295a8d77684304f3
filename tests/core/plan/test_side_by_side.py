"""Stacked products: a kernel that writes its outputs as columns of one matrix, and who may read them so."""

import pytest
import torch

from fake_backend import FakeKernel, compute, llama_graph, plan_for, whole_backend
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.contract.packed import PackedWeights
from kernelmux.graph.formats import Weight
from kernelmux.run.session import Feed, Session

POLICY = """\
[[rule]]
op = ["mul_mat", "qkv", "mul_mat_pair"]
use = "a"

[defaults]
use = "b"
"""


class Stacked(FakeKernel):
    side_by_side = True


class Strided(FakeKernel):
    strided = True


def backends(reader=Strided, **changes):
    """`a` multiplies, and stacks where it can; `b` does the rest, its fused ops by `reader` kernels."""
    products = {
        "mul_mat": FakeKernel(work=compute),
        "qkv": Stacked(work=compute),
        "mul_mat_pair": Stacked(work=compute),
    }
    rest = {op: reader(work=compute) for op in ("rope_copy", "swiglu")}
    gone = dict.fromkeys(("qkv_rope_copy", "gate_up_swiglu", "mul_mat_add"))
    return {"a": backend(**{**products, **changes}), "b": whole_backend(**{**gone, **rest})}


def planned(policy=POLICY, reader=Strided, **changes):
    with registry.isolated(**backends(reader, **changes)) as found:
        return plan_for(llama_graph(2), found, policy)


def kernels(plan):
    return {step.node.op: step.choice.name for step in plan.schedule(4, 4).steps}


def logits(plan):
    """Of five tokens, in two steps; random weights, the same for every plan."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        leaf.name: Weight(leaf.name, v.extents, "f32", (torch.randn(v.extents, generator=generator) / 4,))
        for leaf in plan.graph.leaves
        if leaf.role == "weight"
        for v in leaf.outputs
    }
    session = Session(plan, PackedWeights(weights, plan.device), 8)
    sequence = session.open()
    first = session.step([Feed(sequence, [3, 1, 4, 1], all_logits=True)]).clone()
    return torch.cat([first, session.step([Feed(sequence, [5])])])


def test_a_stacked_product_and_what_follows_are_two_nodes_of_two_backends():
    found = kernels(planned())
    assert (found["qkv"], found["rope_copy"]) == ("a:f32", "b:f32")
    assert (found["mul_mat_pair"], found["swiglu"]) == ("a:f32", "b:f32")


def test_its_numbers_are_those_of_separate_outputs():
    apart = dict.fromkeys(("qkv", "mul_mat_pair"), FakeKernel(work=compute))
    stacked, separate = planned(), planned(**apart)
    assert kernels(stacked) == kernels(separate)
    assert stacked.schedule(4, 4).layout.widths
    assert not separate.schedule(4, 4).layout.widths
    assert torch.equal(logits(stacked), logits(separate))


def test_the_outputs_are_columns_of_one_matrix():
    layout = planned().schedule(4, 4).layout
    start = layout.offsets["blk.0.attn_q"]
    # 32 columns of queries, 16 of keys, 16 of values.
    assert [layout.offsets[f"blk.0.attn_{port}"] - start for port in "qkv"] == [0, 4 * 32, 4 * 48]
    assert {layout.widths[f"blk.0.attn_{port}"] for port in "qkv"} == {64}


def test_where_a_reader_wants_whole_rows_the_plain_products_stay_and_the_plan_says_why():
    plan = planned(reader=FakeKernel)
    assert kernels(plan)["mul_mat"] == "a:f32"
    assert not {"qkv", "mul_mat_pair"} & kernels(plan).keys()
    reasons = {why.kernel: why.reason for why in plan.considered["blk.0.attn_k"]}
    assert reasons["a:f32 of qkv"] == "it writes side by side, and b:f32 of blk.0.rope+copy reads whole rows only"


def test_a_rule_that_insists_is_an_error_then():
    insisting = f'[[rule]]\nop = "qkv"\nuse = "a:f32"\non_unsupported = "error"\n\n{POLICY}'
    with pytest.raises(Exception, match=r"attn_k\+attn_v cannot have a:f32: it writes side by side"):
        planned(insisting, reader=FakeKernel)


def test_the_matrix_has_a_format_that_all_its_readers_take():
    plan = planned(qkv=Stacked(emits=["f16", "bf16"]), mul_mat_pair=Stacked(emits=["q8_32", "f16"]))
    # The readers take f32 alone: neither product may be stacked.
    assert not {"qkv", "mul_mat_pair"} & kernels(plan).keys()
