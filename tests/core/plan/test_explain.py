"""What a plan tells of all its nodes: its table, and what stands at its end."""

import pytest

from command import expanded, read_table, span
from fake_backend import FakeKernel, chain, llama_graph, plan_for, silu_graph, whole_backend
from kernelmux.conformance.testing import backend
from kernelmux.contract import Declined, hookimpl, registry
from kernelmux.plan import explain
from kernelmux.plan.summary import show_summary

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


def test_a_run_is_told_the_summary_and_what_identifies_its_plan():
    lines = explain.run_summary(plan := planned(llama_graph(layers=3)))
    assert lines[:-1] == show_summary(plan)
    assert lines[-1] == f"52 launches (0 conversions) at 1..8 rows; fingerprint {plan.fingerprint}"


def test_buckets_of_as_many_launches_are_told_together():
    policy = """\
fuse = false
[[rule]]
m = "1..2"
use = "b"
[[rule]]
m = "3..4"
use = "a"
[[rule]]
m = "5"
use = "c"
[defaults]
use = "b"
"""
    more = whole_backend(silu=FakeKernel(launches=3))
    plan = planned(chain("silu", "add"), policy, a=whole_backend(), b=whole_backend(), c=more)
    assert plan.buckets == (2, 4, 5, 8)
    last, every = (explain.show(plan, verbose=verbose).splitlines()[-1] for verbose in (False, True))
    assert every.startswith("2 launches (0 conversions) at 1..4 rows, 4 (0) at 5, 2 (0) at 6..8; fingerprint ")
    assert last.startswith("2 launches (0 conversions) at 1..2,6..8 rows; fingerprint ")


def test_what_holds_for_one_row_is_told_of_one():
    with registry.isolated(a=whole_backend()) as found:
        plan = plan_for(chain("silu"), found, "fuse = false\n", max_rows=1)
    last = explain.show(plan, verbose=True).splitlines()[-1]
    assert last.startswith("1 launch (0 conversions) at 1 row; fingerprint ")


def test_reasons_are_short_in_the_table_and_whole_under_verbose():
    policy = '[[rule]]\nop = "add"\nuse = "auto"\n\n[defaults]\nuse = "a"\n'
    plan = planned(chain("silu", "mul", "add"), policy, a=whole_backend())
    assert {row[1]: row[4] for row in rows_of(plan)} == {"silu": "line 5", "mul": "line 5", "add": "auto 1"}
    whole = {row[1]: row[4] for row in rows_of(plan, verbose=True)}
    assert whole == {
        "silu": "defaults (line 5)",
        "mul": "defaults (line 5)",
        "add": "least predicted time, by rule 1 (line 1)",
    }


def test_no_reason_is_cut_in_a_table_of_the_usual_width():
    plan = planned(llama_graph(layers=12), "")
    told = {line.split()[-1] for line in str(plan).split("\n\n")[1].splitlines()[1:]}
    assert told == {"defaults", "fused"}
    assert not any(".." in reason for reason in told)


def test_absent_backends_are_one_line_and_refusals_of_single_kernels_are_not_among_them():
    refusing = {op: Declined("its kernels run on Venus, the plan is for cpu", "device") for op in ("silu", "add")}
    single = backend(silu=[Declined("too wide", "shape", "small"), FakeKernel()], add=FakeKernel())
    plan = planned(chain("silu", "silu", "add"), a=single, far=backend(**refusing))
    *_, last = explain.show(plan).splitlines()
    assert last == "not on this device: far (its kernels run on Venus)"
    assert "too wide" not in explain.show(plan)
    assert "a:small" in explain.show(plan, verbose=True)
    assert explain.show(plan, verbose=True).count("Venus") == 1


def test_a_backend_that_lacks_its_library_is_told_of_once():
    lacking = backend(add=Declined("cupy is not installed", "missing dependency"))
    lacking.device_refusal = hookimpl(lambda device: Declined("cupy is not installed", "missing dependency"))
    plan = planned(chain("silu", "add"), a=whole_backend(), cupy=lacking)
    assert explain.show(plan).count("cupy") == 2
    assert "missed    cupy is not used: cupy is not installed" in explain.show(plan)


def test_a_broken_backend_is_told_of():
    def broken(node, m):
        raise RuntimeError("no luck")

    plan = planned(silu_graph(), a=backend(silu=FakeKernel()), bad=backend(silu=broken))
    (line,) = (line for line in explain.show(plan, width=1000).splitlines() if "bad is quarantined: " in line)
    assert "no luck" in line
    assert [line for line in explain.run_summary(plan, width=1000) if "no luck" in line] == [line]
