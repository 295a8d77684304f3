"""What a plan tells of itself: its table and what stands at its end, and why a node got its kernel."""

from dataclasses import replace

import pytest

from command import expanded, read_table, span
from fake_backend import FakeKernel, chain, llama_graph, plan_for, silu_graph, whole_backend
from kernelmux.conformance.testing import backend
from kernelmux.contract import Declined, registry
from kernelmux.errors import PlanError
from kernelmux.plan import explain
from kernelmux.plan.choice import Rejection, Taken

FEW = '[[rule]]\nm = "1..2"\nop = "silu"\nuse = "b"\n\n[defaults]\nuse = "a"\n'


def planned(graph, policy="fuse = false\n", **backends):
    with registry.isolated(**backends or {"a": whole_backend(), "b": whole_backend()}) as found:
        return plan_for(graph, found, policy)


def rows_of(plan, **options):
    _, lines, *_ = explain.show(plan, width=1000, **options).split("\n\n")
    return read_table(lines.splitlines())[1:]


@pytest.mark.parametrize("policy", ["", "fuse = false\n", FEW], ids=["fused", "plain", "by rows"])
def test_every_step_is_in_one_row_of_its_bucket(policy):
    plan = planned(llama_graph(layers=5), policy)
    rows = rows_of(plan, verbose=True)
    for top in plan.buckets:
        shown = [
            (node, op.split()[0], kernel)
            for name, op, held, kernel, _ in rows
            for node in expanded(name)
            if top in span(held)
        ]
        steps = plan.schedule(top, top).steps
        assert sorted(shown) == sorted((step.node.name, step.node.op, step.choice.name) for step in steps)
    assert len(rows) < len(plan.graph.ops) / 2


def test_layers_that_get_another_kernel_are_a_row_of_their_own():
    plan = planned(llama_graph(layers=4), 'fuse = false\n[[rule]]\nlayer = 1\nuse = "b"\n[defaults]\nuse = "a"\n')
    rows = {name: kernel for name, _, _, kernel, _ in rows_of(plan)}
    assert rows["blk.0,2..3.ffn_silu"] == "a:f32"
    assert rows["blk.1.ffn_silu"] == "b:f32"


def test_what_only_some_row_counts_have_stands_where_it_is_walked():
    plan = planned(chain("silu", "silu", "add"), FEW)
    assert [(row[0], row[2], row[3]) for row in rows_of(plan)] == [
        ("n0", "1..2", "b:f32"),
        ("n0", "3..8", "a:f32"),
        ("n1", "1..2", "b:f32"),
        ("n1", "3..8", "a:f32"),
        ("n2", "1..8", "a:f32"),
    ]


def test_conversions_are_rows_with_both_formats():
    plan = planned(chain("silu", "silu"), a=whole_backend(silu=FakeKernel(takes=["f32"], emits=["bf16"])))
    assert ["n0.as_f32", "convert bf16 to f32"] in [row[:2] for row in rows_of(plan)]


def test_str_is_the_table_and_repr_is_short():
    plan = planned(llama_graph())
    assert str(plan) == explain.show(plan)
    assert "blk.0.attn_q" in str(plan)
    assert len(repr(plan)) < 120
    assert plan.fingerprint in repr(plan)
    assert "\n" not in repr(plan)


def test_the_summary_counts_kernels_and_launches():
    lines = explain.summary(plan := planned(llama_graph(layers=3)), plan.schedule(1, 1))
    assert any(line.split() == ["mul_mat", "22/22", "a:f32"] for line in lines)
    assert any(plan.fingerprint in line and "52 launches (0 conversions)" in line for line in lines)


def test_absent_backends_are_one_line_and_refusals_of_single_kernels_are_not_among_them():
    refusing = {op: Declined("its kernels run on Venus, the plan is for cpu", "device") for op in ("silu", "add")}
    single = backend(silu=[Declined("too wide", "shape", "small"), FakeKernel()], add=FakeKernel())
    plan = planned(chain("silu", "silu", "add"), a=single, far=backend(**refusing))
    *_, last = explain.show(plan).splitlines()
    assert last == "not on this device: far (its kernels run on Venus)"
    assert "too wide" not in explain.show(plan)
    assert "a:small" in explain.show(plan, verbose=True)
    assert explain.show(plan, verbose=True).count("Venus") == 1


def test_a_broken_backend_is_told_of():
    def broken(node, m):
        raise RuntimeError("no luck")

    plan = planned(silu_graph(), a=backend(silu=FakeKernel()), bad=backend(silu=broken))
    (line,) = (line for line in explain.show(plan, width=1000).splitlines() if line.startswith("bad is quarantined: "))
    assert "no luck" in line


# Why.


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
    data = explain.why_data(told, "n1")
    assert data["considered"] == [{"kernel": "z:f32 of swiglu", "reason": "it is Monday", "kind": "unsupported"}]
    assert data["buckets"][0]["variants"][0] == {"rows": 4, "variant": "tile 16", "source": "table"}


def test_why_of_a_part_tells_of_the_fused_node_and_an_unknown_name_raises():
    plan = planned(llama_graph(), "")
    assert "(gate_up_swiglu) runs a:f32" in plan.why("blk.0.ffn_up")
    with pytest.raises(PlanError, match=r"no node 'blk\.0\.ffn_pu'.*did you mean 'blk\.0\.ffn_up'"):
        plan.why("blk.0.ffn_pu")
