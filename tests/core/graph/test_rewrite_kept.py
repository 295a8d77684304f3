"""Which fusions a plan keeps: those whose kernel the policy would have chosen for the parts, or names itself."""

import re

import pytest

from fake_backend import FakeKernel, llama_graph, plan_for, whole_backend
from kernelmux.conformance.testing import backend
from kernelmux.contract import Declined, registry
from kernelmux.errors import PlanError
from kernelmux.graph.graph import Builder
from kernelmux.graph.ops import CORE_OPS, OPS, Fused

QKV = "blk.0.attn_q+attn_k+attn_v"
PLAIN_OPS = [op for op in CORE_OPS if not isinstance(OPS[op], Fused)]
FAST, F32 = FakeKernel("fast", precision=1e-7), FakeKernel("f32")


def plain_backend(**changes):
    """A backend of plain ops alone, and what `changes` say."""
    return backend(**{**dict.fromkeys(PLAIN_OPS, F32), **changes})


def gate_graph():
    """y = silu(gate) * up."""
    b = Builder("g")
    gate, up = (b.leaf(name, ("m", 8), role="state") for name in ("gate", "up"))
    return b.build(b.value("mul", "y", b.value("silu", "gated", gate), up))


def planned(policy="", graph=None, max_rows=8, **backends):
    with registry.isolated(**backends) as found:
        return plan_for(graph or llama_graph(), found, policy, max_rows=max_rows)


def steps(plan, rows=1):
    return {step.node.name: step for step in plan.schedule(rows, rows).steps}


def rule(use, **selectors):
    return f'[[rule]]\nuse = "{use}"\n' + "".join(f'{key} = "{value}"\n' for key, value in selectors.items())


def test_a_whole_backend_gets_the_longest_fusions():
    plan = planned(a=whole_backend())
    assert [step.node.op for step in steps(plan).values() if step.node.layer == 0] == [
        *("rms_norm", "qkv_rope_copy", "attention", "mul_mat", "add_rms_norm", "gate_up_swiglu", "mul_mat_add")
    ]
    assert plan.fused["blk.0.attn_add+ffn_norm"] == ("blk.0.attn_add", "blk.0.ffn_norm")


def test_a_backend_of_plain_ops_is_a_whole_backend():
    plan = planned(a=plain_backend())
    assert len(steps(plan)) == len(llama_graph().ops)
    assert not plan.fused


def test_fuse_false_keeps_the_plain_nodes():
    plan = planned("fuse = false", a=whole_backend())
    assert list(steps(plan)) == [node.name for node in llama_graph().ops]
    assert not plan.fused


def test_a_kept_fusion_says_what_it_stands_for():
    step = steps(planned(a=plain_backend(qkv=F32)))[QKV]
    assert (step.choice.name, step.node.op) == ("a:f32", "qkv")
    assert "3 nodes" in step.choice.reason


# (what the policy says, what backend `a` has, the kernel of qkv or None); `b` has all ops in its f32.
AGREEMENT = {
    "the same name": ("", {"mul_mat": [FAST, F32], "qkv": [F32, FAST]}, "a:fast"),
    "another kernel than was chosen": ("", {"mul_mat": [FAST, F32], "qkv": F32}, None),
    "the kernel that a rule chose": (
        rule("a:f32", op="mul_mat"),
        {"mul_mat": [FAST, F32], "qkv": [FAST, F32]},
        "a:f32",
    ),
    "one part is another backend's": (rule("b", node="*attn_k"), {"qkv": F32}, None),
    "one part is another kernel's": (
        rule("a:fast", node="*attn_k"),
        {"mul_mat": [F32, FAST], "qkv": [F32, FAST]},
        None,
    ),
    "it is forbidden as the parts are": ('forbid = "a:f32"', {"mul_mat": [F32, FAST], "qkv": [F32, FAST]}, "a:fast"),
    "it declines": ("", {"qkv": Declined("not today")}, None),
}


@pytest.mark.parametrize(("policy", "has", "kernel"), AGREEMENT.values(), ids=AGREEMENT)
def test_a_kernel_stands_for_weights_only_under_the_name_that_was_chosen_for_them(policy, has, kernel):
    found = steps(planned(policy, a=plain_backend(**has), b=plain_backend(qkv=F32)))
    assert (found[QKV].choice.name if QKV in found else None) == kernel


WEIGHTLESS = {
    "the backend's": ("", {}, "a:other"),
    "the backend named": (rule("a", op="silu"), {}, "a:other"),
    "one of its kernels named": (rule("a:f32", op="silu"), {}, None),
    "its own name named": (rule("a:other", op="silu"), {"silu": [F32, FakeKernel("other")]}, "a:other"),
    "another backend's": (rule("b", op="silu"), {}, None),
}


@pytest.mark.parametrize(("policy", "has", "kernel"), WEIGHTLESS.values(), ids=WEIGHTLESS)
def test_a_kernel_stands_for_the_rest_where_the_backend_was_chosen(policy, has, kernel):
    one = plain_backend(swiglu=FakeKernel("other"), **has)
    found = steps(planned(policy, gate_graph(), a=one, b=plain_backend()))
    assert (found["gated+y"].choice.name if "gated+y" in found else None) == kernel


@pytest.mark.parametrize("policy", ["", rule("b:f32", op="silu")])
def test_a_kernel_stands_for_no_other_backends_kernels_and_the_plan_says_so(policy):
    one, other = backend(swiglu=FakeKernel("other"), add=F32), plain_backend()
    plan = planned(policy, gate_graph(), a=one, b=other)
    assert "gated+y" not in steps(plan)
    (why,) = (why for why in plan.considered["gated"] if why.kernel == "a:other of swiglu")
    assert re.match("silu was given to b:f32, by (defaults|rule 1)", why.reason)


def test_a_fusion_is_kept_at_the_row_counts_where_the_parts_agree():
    policy = '[[rule]]\nop = "silu"\nm = "2..4"\nuse = "b"\n'
    plan = planned(policy, gate_graph(), a=whole_backend(), b=plain_backend())
    assert {rows: len(steps(plan, rows)) for rows in (1, 2, 4, 5, 8)} == {1: 1, 2: 2, 4: 2, 5: 1, 8: 1}


# A rule that names the fused op.


def test_a_rule_that_names_the_fused_op_decides():
    policy = rule("b", op="qkv")
    step = steps(planned(policy, a=plain_backend(), b=plain_backend(qkv=F32)))[QKV]
    assert (step.choice.name, step.choice.reason) == ("b:f32", "rule 1 (p.toml:1)")


def test_a_rule_that_names_a_fused_op_stops_where_it_says_so():
    policy = rule("b", op="qkv", on_unsupported="error")
    with pytest.raises(PlanError, match=r"attn_q\+attn_k\+attn_v \(qkv.*b has no qkv"):
        planned(policy, a=plain_backend(qkv=F32), b=plain_backend())


@pytest.mark.parametrize("others", [{}, {"qkv": FakeKernel("slow")}], ids=["nobody", "a kernel that nobody chose"])
def test_where_a_rule_names_a_fused_op_that_its_kernels_decline_the_parts_stay(others):
    """A fused op stands in only where a chosen kernel takes it: the defaults chose a:f32, for the plain ones."""
    policy = rule("b", op="qkv") + '[defaults]\nuse = ["a"]\n'
    plan = planned(policy, a=plain_backend(**others), b=plain_backend())
    assert QKV not in steps(plan)


def test_a_rule_about_weights_speaks_of_all_of_a_fused_nodes():
    b = Builder("g")
    x = b.leaf("x", ("m", 256), role="state")
    formats = ("Q4_K", "Q4_K", "Q6_K")
    weights = [b.leaf(f"w{part}", (16, 256), format) for part, format in zip("qkv", formats, strict=True)]
    graph = b.build(*(b.value("mul_mat", weight.name[1:], x, weight=(weight,)) for weight in weights))
    told = []

    def qkv(node, m):
        told.append(node.contract.arguments(node)["weight_formats"])
        return [F32, FAST]

    both = {"mul_mat": [F32, FAST], "qkv": qkv}
    policy = '[[rule]]\nweight = "Q4_K"\nuse = "a:fast"\n'
    # v, in Q6_K, gets another kernel: no fused kernel could stand for all three.
    found = steps(planned(policy, graph, a=plain_backend(**both)))
    assert {name: step.choice.name for name, step in found.items()} == {"q": "a:fast", "k": "a:fast", "v": "a:f32"}
    found = steps(planned(policy.replace('"Q4_K"', '["Q4_K", "Q6_K"]'), graph, a=plain_backend(**both)))
    assert {name: step.choice.name for name, step in found.items()} == {"q+k+v": "a:fast"}
    assert set(told) == {formats}


# What the parts' rules say holds for the node that stands for them.


def test_a_fused_kernel_keeps_the_error_budget_of_its_parts():
    policy = '[[rule]]\nop = "mul_mat"\nuse = "a"\nmax_error = 1e-8\n'
    found = steps(planned(policy, a=plain_backend(qkv=FakeKernel("f32", precision=1e-3))))
    assert QKV not in found
    assert found["blk.0.attn_q"].choice.name == "a:f32"


def test_a_rule_about_one_part_by_name_keeps_it_where_the_rule_puts_it():
    found = steps(planned(rule("b:f32", node="blk.0.attn_v"), a=whole_backend(), b=plain_backend()))
    assert found["blk.0.attn_v"].choice.name == "b:f32"
