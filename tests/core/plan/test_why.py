"""Why a node got its kernel: choices by row count, losers, variants, and what a fused node stands for."""

from dataclasses import replace

import pytest

from fake_backend import FakeKernel, FewRows, chain, llama_graph, plan_for, whole_backend
from kernelmux.contract import Declined, registry
from kernelmux.errors import PlanError
from kernelmux.plan.choice import Rejection, Taken
from kernelmux.plan.why import why_data

FEW = '[[rule]]\nm = "1..2"\nop = "silu"\nuse = "b"\n\n[defaults]\nuse = "a"\n'
AUTO = '[defaults]\nuse = ["auto"]\n'


def planned(graph, policy="fuse = false\n", **backends):
    with registry.isolated(**backends or {"a": whole_backend(), "b": whole_backend()}) as found:
        return plan_for(graph, found, policy)


def test_why_joins_row_counts_and_losers_that_are_told_the_same():
    plan = planned(chain("silu", "add"), FEW, a=whole_backend(), b=whole_backend(), c=whole_backend())
    assert plan.why("n1").splitlines() == [
        "rows 1..8: n1 (add) runs a:f32: defaults (p.toml:6)",
        "  not b:f32, c:f32: a:f32 comes first in defaults (p.toml:6) [outranked]",
    ]
    assert [line.partition(":")[0] for line in plan.why("n0").splitlines() if line.startswith("rows")] == [
        "rows 1..2",
        "rows 3..8",
    ]


def test_why_has_variants_and_fused_candidates():
    plan = planned(chain("silu", "mul"))
    steps = plan.schedule(8, 8).steps
    taken = (Taken(4, "tile 16", "table"), Taken(8, "tile 32", "default"))
    varied = tuple(replace(step, choice=replace(step.choice, variants=taken)) for step in steps)
    refused = (Rejection("z:f32 of swiglu", "it is Monday", "unsupported"),)
    told = replace(
        plan,
        schedules={(8, 8): replace(plan.schedule(8, 8), steps=varied)},
        considered={"n1": refused},
    )
    assert "  variants: tile 16 up to 4 rows (table); tile 32 up to 8 rows (default)" in told.why("n1").splitlines()
    *_, heading, last = told.why("n1").splitlines()
    assert (heading, last) == ("fused candidates:", "  not z:f32 of swiglu: it is Monday [unsupported]")
    assert "fused" not in told.why("n0")
    data = why_data(told, "n1")
    assert data["considered"] == [{"kernel": "z:f32 of swiglu", "reason": "it is Monday", "kind": "unsupported"}]
    assert data["buckets"][0]["variants"][0] == {"rows": 4, "variant": "tile 16", "source": "table"}


def test_why_of_a_part_tells_of_the_fused_node_and_an_unknown_name_raises():
    plan = planned(llama_graph(), "")
    assert "(gate_up_swiglu) runs a:f32" in plan.why("blk.0.ffn_up")
    with pytest.raises(PlanError, match=r"no node 'blk\.0\.ffn_pu'.*did you mean 'blk\.0\.ffn_up'"):
        plan.why("blk.0.ffn_pu")


def test_what_was_refused_at_several_row_counts_is_told_once_with_these():
    def silu(node, m):
        small = FakeKernel("small") if m <= 2 else Declined(f"it takes m ..2, not {m}", "shape", "small")
        return [FakeKernel(), small, Declined("it is odd", "shape", "odd")]

    plan = planned(chain("silu"), FEW, a=whole_backend(silu=silu), b=whole_backend(silu=silu))
    assert plan.why("n0").splitlines() == [
        "rows 1..2: n0 (silu) runs b:f32: rule 1 (p.toml:1)",
        "  not b:small, a:f32, a:small: b:f32 comes first in rule 1 (p.toml:1) [outranked]",
        "rows 3..8: n0 (silu) runs a:f32: defaults (p.toml:6)",
        "  not b:f32: a:f32 comes first in defaults (p.toml:6) [outranked]",
        "refused:",
        "  not b:odd, a:odd: it is odd [shape]",
        "  not a:small, b:small at 3..8 rows: it takes m ..2 [shape]",
    ]


@pytest.mark.parametrize("policy", [AUTO, ""], ids=["auto", "by a rule"])
def test_a_fused_node_is_told_with_its_time_and_that_of_its_parts(policy):
    parts = {op: FakeKernel(reading=0.1) for op in ("mul_mat", "silu", "mul")}
    plan = planned(llama_graph(), policy, a=whole_backend(**parts))
    (bucket,) = why_data(plan, "blk.0.ffn_silu")["buckets"]
    assert bucket["node"] == "blk.0.ffn_gate+ffn_up+ffn_silu+ffn_mul"
    assert [part["node"] for part in bucket["parts"]] == [f"blk.0.ffn_{part}" for part in ("gate", "up", "silu", "mul")]
    assert {part["kernel"] for part in bucket["parts"]} == {"a:f32"}
    text = " ".join(plan.why("blk.0.ffn_silu").split())
    assert "ffn_mul (gate_up_swiglu) runs a:f32: " in text
    assert ", predicted " in text
    apart = sum(part["us"] for part in bucket["parts"])
    assert f"its 4 parts would take {apart:.3g} us: ffn_gate " in text
    if policy == AUTO:
        assert bucket["predicted"]["us"] < apart


def test_who_was_predicted_to_be_slower_comes_before_who_was_refused():
    rough = FakeKernel("rough", precision=1.0, reading=1.0)
    silu = whole_backend(silu=[FakeKernel("fast", reading=0.9), rough, FakeKernel("slow", reading=1e-9)])
    text = planned(chain("silu"), AUTO, a=silu).why("n0")
    head, slow, refused = " ".join(text.split()).split(" not a:")
    assert head.startswith("rows 1..8: n0 (silu) runs a:fast: least predicted time, by defaults (p.toml:1), predicted ")
    assert head.endswith(" us at 8 rows (declared, bound by reading)")
    assert slow.startswith("slow: predicted ")
    assert slow.endswith(" s (declared, bound by reading) [outranked]")
    assert refused.startswith("rough: its error 1 is over ")


def test_of_one_row_count_only_its_bucket_is_told():
    plan = planned(
        chain("silu"), AUTO, a=whole_backend(silu=[FewRows("few", 20.0, reading=0.9), FakeKernel("slow", reading=0.1)])
    )
    assert plan.why("n0").count("rows ") > plan.why("n0", 1).count("rows ")
    assert "rows 1..2: n0 (silu) runs a:few" in plan.why("n0", 2)
    assert "a:slow: least" not in plan.why("n0", 2)
    with pytest.raises(PlanError, match="the plan takes up to 8 rows, 9 were asked for"):
        plan.why("n0", 9)


def test_who_is_faster_by_itself_is_told_what_keeps_it_from_the_node():
    narrow = FakeKernel("narrow", takes=["bf16"], emits=["bf16"], reading=0.6)
    kernels = whole_backend(silu=[FakeKernel("wide"), narrow], convert=FakeKernel("f32"))
    text = " ".join(planned(chain("silu", columns=4096), AUTO, a=kernels).why("n0").split())
    assert "not a:narrow: predicted " in text
    assert "; the whole step is predicted to be slower with it, for conversions and storage beside it" in text


def test_who_would_pack_weights_once_more_is_told_so():
    few = FewRows("few", 1.07, packed="few", packed_bytes=10**6, reading=0.95)
    many = FakeKernel("many", packed="many", packed_bytes=10**6, reading=0.9)
    kernels = whole_backend(mul_mat=[few, many], embed=FakeKernel(), rms_norm=FakeKernel())
    text = " ".join(planned(llama_graph(1), "fuse = false\n" + AUTO, a=kernels).why("blk.0.ffn_down").split())
    assert text.count("it would pack the weights once more") == 1
    # Who was chosen is not the fastest by itself, and is not called so.
    assert text.count("least predicted time without another packed copy, by defaults") == 1
    assert text.count("least predicted time, by defaults") == text.count(" runs a:") - 1


def test_a_row_that_leaves_out_layers_or_parts_of_a_long_name_stands_for_all_between():
    plan = planned(llama_graph(9), "fuse = false\n")
    assert plan.why("blk.0..1,..,7..8.attn_q").startswith("rows 1..8: blk.0..8.attn_q ")
    fused = planned(llama_graph(2), "")
    assert "attn_q+attn_k+attn_v+rope+copy" in fused.why("blk.0..1.attn_q+..+copy")
    with pytest.raises(PlanError, match="no node"):
        plan.why("blk.0..1,..,7..8.nothing")
