"""`parts`: a rule of a fused op that leaves its plain nodes to run, each by its own rule."""

import pytest

from fake_backend import CPU, FakeKernel, llama_graph, plan_for, whole_backend
from kernelmux.contract import Declined, registry
from kernelmux.plan.check import check_policy
from kernelmux.policy.policy import parse_policy

PARTS = '[[rule]]\nop = "mul_mat_pair"\nm = "3.."\nuse = "parts"\n\n'
NAMED = '[[rule]]\nop = "gate_up_swiglu"\nuse = "parts"\n\n[defaults]\nuse = "a"\n'
AUTO = '[[rule]]\nop = "gate_up_swiglu"\nuse = "parts"\n\n[defaults]\nuse = "auto"\n'
PAIR = "blk.{}.ffn_gate+ffn_up"


def planned(policy, use=(), layers=2, **changes):
    """`pair` is so fast that nobody leaves it out of his own accord."""
    pair = FakeKernel("pair", reading=1e6)
    with registry.isolated(a=whole_backend(**{"mul_mat_pair": pair, **changes})) as found:
        return plan_for(llama_graph(layers), found, policy, use=use)


def ops(plan, rows):
    return [step.node.op for step in plan.schedule(rows, rows).steps]


@pytest.mark.parametrize("rest", [NAMED, AUTO], ids=["by name", "auto"])
def test_where_a_rule_says_parts_no_kernel_takes_the_fused_node(rest):
    pair = {"mul_mat_pair": FakeKernel(reading=1e6)}
    plan = planned(PARTS + rest, **pair)
    assert ["mul_mat_pair" in ops(plan, rows) for rows in (1, 2, 3, 8)] == [True, True, False, False]
    assert plan.notes == ()
    said = "not a:f32 of mul_mat_pair: its parts run, by rule 1 (p.toml:1) [outranked]"
    assert said in " ".join(plan.why("blk.1.ffn_up").split())


def test_its_parts_run_each_by_its_own_rule():
    rules = '[[rule]]\nnode = "*.ffn_up"\nuse = "a:up"\n\n[[rule]]\nop = "mul_mat"\nuse = "a:any"\n\n'
    plan = planned(PARTS + rules + AUTO, mul_mat=[FakeKernel("up"), FakeKernel("any")])
    taken = {step.node.name: step.choice.name for step in plan.schedule(8, 8).steps}
    assert taken["blk.0.ffn_up"] == "a:up"
    assert taken["blk.0.ffn_gate"] == "a:any"


@pytest.mark.parametrize("rest", [NAMED, AUTO], ids=["by name", "auto"])
def test_a_kernel_before_it_is_asked_first(rest):
    def few(node, m):
        return FakeKernel("pair") if m <= 2 else Declined("two rows at most", "shape", kernel="pair")

    rule = '[[rule]]\nop = "mul_mat_pair"\nuse = ["a:pair", "parts"]\non_unsupported = "error"\n\n'
    plan = planned(rule + rest, mul_mat_pair=few)
    assert ["mul_mat_pair" in ops(plan, rows) for rows in (1, 2, 3, 8)] == [True, True, False, False]
    assert plan.notes == ()
    assert "not a:pair of mul_mat_pair: two rows at most [shape]" in plan.why("blk.0.ffn_up")


def test_a_kernel_before_it_that_has_raised_gives_way_to_the_parts():
    pair = {"a": whole_backend(mul_mat_pair=FakeKernel("pair"))}
    rule = '[[rule]]\nop = "mul_mat_pair"\nuse = ["a:pair", "parts"]\n\n'
    with registry.isolated(**pair) as found:
        plan = plan_for(llama_graph(1), found, rule + NAMED).without(PAIR.format(0), "a:pair")
    assert "mul_mat_pair" not in ops(plan, 1)


@pytest.mark.parametrize("rest", [NAMED, AUTO], ids=["by name", "auto"])
def test_a_rule_of_one_layer_speaks_of_that_layer_alone(rest):
    rule = '[[rule]]\nop = "mul_mat_pair"\nlayer = 0\nuse = "parts"\n\n'
    plan = planned(rule + rest, mul_mat_pair=FakeKernel(reading=1e6))
    names = {step.node.name for step in plan.schedule(1, 1).steps if step.node.op == "mul_mat_pair"}
    assert names == {PAIR.format(1)}


def test_under_auto_a_rule_of_one_layer_leaves_the_others_their_best():
    rule = '[[rule]]\nop = "mul_mat"\nlayer = 0\nuse = "a:slow"\n\n[defaults]\nuse = "auto"\n'
    with registry.isolated(a=whole_backend(mul_mat=[FakeKernel("slow", reading=0.1), FakeKernel("fast")])) as found:
        plan = plan_for(llama_graph(3), found, "fuse = false\n" + rule)
    taken = {step.node.name: step.choice.name for step in plan.schedule(1, 1).steps if step.node.op == "mul_mat"}
    assert {name for name, kernel in taken.items() if kernel == "a:slow"} == {
        n for n in taken if n.startswith("blk.0.")
    }


def test_an_option_may_say_it_too():
    plan = planned(NAMED, use=["mul_mat_pair=parts"], mul_mat_pair=FakeKernel())
    assert "mul_mat_pair" not in ops(plan, 1)
    assert plan.notes == ()
    assert "its parts run, by --use mul_mat_pair=parts" in " ".join(plan.why("blk.0.ffn_up").split())


def test_a_rule_whose_fused_op_would_stand_nowhere_matches_nothing():
    plan = planned("fuse = false\n" + PARTS + NAMED)
    assert len(plan.notes) == 1
    assert "rule 1 (p.toml:2), rule 2 (p.toml:7) match no node of llama on cpu" in plan.notes[0]


def test_policy_check_finds_nothing_wrong_with_it():
    with registry.isolated(a=whole_backend()) as found:
        policy = parse_policy(PARTS + NAMED, "p.toml")
        assert check_policy(policy, found, CPU, llama_graph(1)) == []
