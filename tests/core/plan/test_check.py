"""What `policy check` finds: names of nothing, rules that never hold, assertions that fail. And no more."""

from importlib import resources
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_backend import CPU, FakeKernel, chain, llama_graph, whole_backend
from kernelmux.conformance.testing import backend
from kernelmux.contract import Declined, registry
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import TensorNode
from kernelmux.plan.check import check_policy
from kernelmux.policy.grammar import Selectors
from kernelmux.policy.policy import parse_policy

EXAMPLES = sorted((Path(__file__).parents[3] / "examples" / "policies").glob("*.toml"))
SHIPPED = [*(resources.files("kernelmux.policy").joinpath(f"{name}.toml") for name in ("default", "exact")), *EXAMPLES]


def check(text, graph=None, device=CPU, **backends):
    """The findings as (line, message); backends `a` (f32, fast) and `b` (f32) unless told."""
    fast = [FakeKernel(), FakeKernel("fast", precision=1e-4), Declined("too wide", "shape", "wide")]
    backends = backends or {"a": whole_backend(silu=fast, mul_mat=fast), "b": whole_backend()}
    with registry.isolated(**backends) as found:
        findings = check_policy(parse_policy(text, "p.toml"), found, device, graph)
    return [(finding.line, finding.message) for finding in findings]


def rule(use="a", **selectors):
    return f'[[rule]]\nuse = "{use}"\n' + "".join(f'{key} = "{value}"\n' for key, value in selectors.items())


# Names.


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (rule("aa:fast"), 2, "unknown backend 'aa' (did you mean 'a'?); known: a, b"),
        (rule("a:fats"), 2, "unknown kernel 'a:fats' (did you mean 'a:fast'?); known: a:f32, a:fast, a:wide"),
        (rule("b:fast"), 2, "unknown kernel 'b:fast'"),
        (rule(op="add") + rule("zzz"), 5, "unknown backend 'zzz'; known: a, b"),
        ('[[require]]\nop = "add"\nkernel = "a:f23"\n', 3, "unknown kernel 'a:f23' (did you mean 'a:f32'?)"),
        ('\n[defaults]\nuse = ["a", "c"]\n', 3, "unknown backend 'c'"),
        ('\n\nforbid = ["a:slow"]\n', 3, "unknown kernel 'a:slow'"),
        (rule("c", on_unsupported="error"), 2, "unknown backend 'c'"),
    ],
    ids=["backend", "kernel", "another's kernel", "second rule", "requirement", "defaults", "forbid", "error"],
)
def test_a_name_of_nothing_is_found_with_its_line_and_the_nearest(text, line, message):
    ((found_line, found),) = check(text)
    assert message in found
    assert found_line == line


@pytest.mark.parametrize(
    "text",
    [
        "",
        rule("a:fast") + '[defaults]\nuse = ["b", "a"]\n',
        rule("a:wide"),
        rule("triton:int4"),
        rule("mine", on_unsupported="next"),
        'forbid = ["cupy"]\n',
        '[[require]]\nkernel = ["numba", "a"]\n',
    ],
    ids=[
        "nothing",
        "all known",
        "one that declines",
        "official",
        "optional",
        "official forbidden",
        "official required",
    ],
)
def test_names_that_may_be_meant_are_no_findings(text):
    assert check(text) == []


def test_with_a_model_a_backend_that_is_not_installed_is_one():
    said = "rule 1 (p.toml:1) asks for triton:int4, and triton is not installed: pip install kernelmux-triton"
    assert check(rule("triton:int4"), llama_graph(1)) == [(1, said)]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (rule("bad:int4"), 1, "rule 1 (p.toml:1) asks for bad:int4, and bad is quarantined: "),
        (rule("a") + rule("bad", on_unsupported="next"), 3, "rule 2 (p.toml:3) asks for bad, which is quarantined: "),
        ('[[require]]\nkernel = "bad"\n', 2, "requirement 1 (p.toml:2) asks for bad, which is quarantined: "),
        ('[defaults]\nuse = ["a", "bad"]\n', 2, "defaults (p.toml:2) asks for bad, which is quarantined: "),
        ('\nforbid = "bad"\n', 2, "forbid (p.toml:2) names bad, which is quarantined: "),
    ],
    ids=["kernel", "backend", "requirement", "defaults", "forbid"],
)
def test_a_quarantined_backend_is_told_of_and_its_kernels_are_not_called_unknown(text, line, said):
    """What it has nobody can say: `kernelmux backends` shows what is wrong with it."""
    broken = whole_backend()
    broken.CONTRACT = 99
    found_line, found = check(text, a=whole_backend(), bad=broken)[0]
    assert (found_line, found.startswith(said)) == (line, True), found


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (rule("a:fast"), 2, "rule 1 (p.toml:2) asks for a:fast, which forbid (p.toml:1) excludes"),
        (
            '[[require]]\nkernel = ["b", "a"]\n',
            3,
            "requirement 1 (p.toml:3) asks for a, which forbid (p.toml:1) excludes",
        ),
        ('[defaults]\nuse = ["a:f32"]\n', 3, "defaults (p.toml:3) asks for a:f32, which forbid (p.toml:1) excludes"),
    ],
    ids=["rule", "requirement", "defaults"],
)
def test_what_a_policy_asks_for_and_forbids_is_found(text, line, said):
    assert check('forbid = ["a"]\n' + text) == [(line, said)]
    # A backend may be asked for without one of its kernels.
    assert check('forbid = ["a:fast"]\n' + rule("a")) == []


def test_a_kernel_for_one_op_weight_or_row_count_alone_is_known():
    one = FakeKernel("only")

    def mul_mat(node, m):
        return one if node.weight[0].format == "Q6_K" and m == 1 else Declined("only one row of Q6_K", "format")

    assert check(rule("a:only"), a=whole_backend(mul_mat=mul_mat)) == []


# Rules that are never reached.

RULES = {
    "all before one op": [{}, {"op": "add"}],
    "a wider range before": [{"m": "1..8"}, {"m": "2..3", "op": "add"}],
    "all layers from 2 before": [{"layer": "2.."}, {"layer": "5..7"}],
    "the same twice": [{"op": "add"}, {"op": "add"}],
    "a pattern before a name of it": [{"node": "blk.*"}, {"node": "blk.0.attn_q"}],
    "any device before one": [{"op": "add"}, {"op": "add", "device": "cuda"}],
    "an older card before": [{"capability": "8.0"}, {"capability": "9.0"}],
    "the same with a weight": [{"op": "mul_mat"}, {"op": "mul_mat", "weight": "Q4_0"}],
    "the same with a dtype": [{"dtype": "f32"}, {"dtype": "F32", "m": "1"}],
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_a_rule_behind_one_that_matches_all_of_it_is_found(rules):
    text = "".join(rule(**selectors) for selectors in rules)
    ((line, message),) = check(text)
    assert line == 3 + len(rules[0])
    assert message == "rule 2 is never reached: rule 1 (p.toml:1) matches all that it does"
    assert check("".join(rule(**selectors) for selectors in rules[::-1])) == [] or rules[0] == rules[1]


SELECTORS = {
    "op": st.sampled_from([("mul_mat",), ("add",), ("add", "mul_mat")]),
    "node": st.sampled_from([("blk.*",), ("blk.0.q",), ("*",), ("blk.?.q", "out"), ("[bo]*",), ("blk.*", "out")]),
    "layer": st.sampled_from(["0", "0..1", "1..", "..0", "2"]),
    "m": st.sampled_from(["1", "1..2", "2..", "..2", "0.."]),
    "weight": st.sampled_from([("Q4_0",), ("f32", "Q4_0"), ("Q6_K",)]),
    "dtype": st.sampled_from([("f32",), ("bf16", "f32")]),
    "device": st.sampled_from(["cpu", "cuda"]),
    "capability": st.sampled_from(["0.0", "8.0", "9.0", "10.0"]),
}
selectors = st.fixed_dictionaries({}, optional=SELECTORS).map(lambda given: Selectors.model_validate(given))
NODES = [
    TensorNode(
        name=name,
        op=op,
        layer=layer,
        weight=tuple(Value("w", (8, 8), format) for format in weights),
        outputs=(Value("y", ("m", 8), dtype),),
    )
    for name, op, layer, weights, dtype in product(
        ["blk.0.q", "blk.1.v", "out"],
        ["mul_mat", "add"],
        [None, 0, 2],
        [(), ("Q4_0",), ("Q4_0", "f32")],
        ["f32", "f16"],
    )
]
DEVICES = [CPU, *(Device("cuda", 0, "card", capability) for capability in ((7, 5), (8, 6), (10, 0)))]
UNIVERSE = list(product(NODES, (1, 2, 3), DEVICES))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(first=selectors, second=selectors)
def test_what_is_said_to_cover_matches_all_that_the_other_does(first, second):
    """A rule that is called unreachable truly is: against every node of a small universe."""
    assert first.covers(first)
    for ours, theirs in ((first, second), (second, first)):
        if ours.covers(theirs):
            assert all(ours.matches(*place) for place in UNIVERSE if theirs.matches(*place))


# Against a model.


def test_rules_and_requirements_that_match_no_node_are_found():
    text = (
        rule(op="attention")
        + rule(node="blk.7.*", m="2..")
        + rule(op="add")
        + '[[require]]\nop = "qkv"\nkernel = "a"\n[[require]]\nop = "add"\nkernel = "a"\n'
    )
    assert check(text, chain("silu", "add")) == [
        (1, "rule 1 matches no node of chain on cpu"),
        (4, "rule 2 matches no node of chain on cpu"),
        (11, "requirement 1 matches no node of chain on cpu"),
    ]
    assert check(text) == []


def test_a_requirement_that_fails_is_found_at_its_line():
    text = rule("b", op="silu") + '\n[[require]]\nop = ["silu"]\nkernel = "a"\n'
    ((line, message),) = check(text, chain("silu", "add", "silu"))
    assert line == 5
    assert "requires a" in message
    assert "n0 has b:f32" in message


def test_a_plan_that_nobody_can_make_is_found_with_every_refusal():
    text = "\n" + rule("b", op="silu", on_unsupported="error")
    ((line, message),) = check(text, chain("silu"), a=whole_backend(), b=backend(add=FakeKernel()))
    assert line == 2
    assert "no kernel takes n0" in message
    assert "b has no silu" in message


MATCHED = {
    "one layer": rule(layer="1"),
    "few rows": rule("b", m="3"),
    "a part of a fused node": rule(node="blk.0.attn_q"),
    "an op inside a fused node": rule(op="silu"),
    "rows at which its kernel declines": rule("b:fast", on_unsupported="next", m="3"),
    "a requirement for few rows": '[[require]]\nm = "2..3"\nop = "add"\nkernel = "a"\n',
    "a requirement for a part": '[[require]]\nnode = "blk.*.attn_q"\nkernel = "a"\n',
}


@pytest.mark.parametrize("text", MATCHED.values(), ids=MATCHED)
def test_what_matches_some_node_at_some_row_count_is_no_finding(text):
    b = whole_backend(silu=[FakeKernel(), Declined("not today", "shape", "fast")])
    assert check(text, llama_graph(2), a=whole_backend(), b=b) == []


def test_findings_come_by_line():
    text = rule("a:typo") + rule("c") + rule("b") + '[defaults]\nuse = ["d"]\n'
    lines = [line for line, _ in check(text)]
    assert lines == sorted(lines)
    assert len(lines) == 5


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_policies_have_no_findings(path):
    assert check_policy(parse_policy(path.read_text("utf-8"), path.name), registry.current(), CPU) == []
