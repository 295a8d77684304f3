"""Names in a policy: what is broken is said aloud, or is an error where a rule insists."""

import re
from types import SimpleNamespace

import pytest

from command import assert_one_line_error, call_command
from fake_backend import CPU, FakeKernel, llama_graph, plan_for, silu_graph, whole_backend
from kernelmux.contract import Declined, registry
from kernelmux.contract.device import described_device
from kernelmux.errors import PolicyError
from kernelmux.plan.check import check_policy
from kernelmux.plan.plan import make_plan
from kernelmux.policy.policy import default_policy, parse_policy

BROKEN = SimpleNamespace(CONTRACT=99)
FAULT = "is quarantined: BackendError: the backend was built for contract 99"


def planned(policy="", more=None, use=()):
    with registry.isolated(a=whole_backend(), broken=BROKEN, **more or {}) as found:
        return plan_for(silu_graph(), found, policy, use=use)


@pytest.mark.parametrize(
    ("asked", "place"),
    [
        ({"policy": '[[rule]]\nuse = ["broken", "a"]\n'}, r"rule 1 \(p\.toml:1\) asks for broken, which "),
        (
            {"policy": '[[rule]]\nuse = "broken"\non_unsupported = "next"\n'},
            r"rule 1 \(p\.toml:1\) asks for broken, which ",
        ),
        ({"policy": '[defaults]\nuse = ["broken", "a"]\n'}, r"defaults \(p\.toml:2\) asks for broken, which "),
        ({"policy": 'forbid = "broken"\n'}, r"forbid \(p\.toml:1\) names broken, which "),
    ],
    ids=["rule", "next", "defaults", "forbid"],
)
def test_asking_for_a_quarantined_backend_is_noted_with_its_fault(asked, place):
    plan = planned(**asked)
    assert plan.schedule(1, 1).steps[0].choice.name == "a:f32"
    (note,) = plan.notes
    assert re.match(place, note)
    assert FAULT in note


def test_nobody_is_told_of_a_broken_backend_that_was_not_asked_for():
    assert planned().notes == ()


def test_of_the_backends_that_the_environment_names_a_broken_one_is_told_of():
    with registry.isolated(a=whole_backend(), broken=BROKEN) as found:
        found.allowed = ("a", "broken")
        (note,) = plan_for(silu_graph(), found).notes
    assert note.startswith(f"KERNELMUX_BACKENDS asks for broken, which {FAULT}")


def test_it_is_an_error_where_the_rule_says_so():
    rule = '[[rule]]\nuse = "broken:fast"\non_unsupported = "error"\n'
    with pytest.raises(PolicyError, match=rf"^rule 1 \(p\.toml:1\) asks for broken:fast, and broken {FAULT}") as caught:
        planned(rule)
    assert (caught.value.file, caught.value.line, caught.value.backend) == ("p.toml", 1, "broken")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"use": ["silu=broken"]}, "--use silu=broken asks for broken, which "),
        ({"use": ["*=broken:fast,a"]}, "--use *=broken:fast,a asks for broken:fast, and broken "),
        (
            {"policy": '[[rule]]\nuse = ["a", "broken"]\non_error = "error"\n'},
            "rule 1 (p.toml:1) asks for broken, which ",
        ),
    ],
    ids=["use", "a kernel", "on_error"],
)
def test_it_is_an_error_where_it_is_asked_for_by_name(asked, said):
    with pytest.raises(PolicyError, match=re.escape(said + FAULT)):
        planned(**asked)


def test_a_backend_that_several_rules_ask_for_is_told_of_once():
    rules = '[[rule]]\nop = "add"\nuse = "broken"\n[[rule]]\nop = "silu"\nuse = "broken"\n'
    broken = [note for note in planned(rules).notes if FAULT in note]
    assert [note.partition(" asks")[0] for note in broken] == ["rule 1 (p.toml:1)"]


def test_the_command_line_says_on_stderr_what_is_broken_and_goes_on(tiny, tmp_path):
    path = tmp_path / "p.toml"
    path.write_text('[[rule]]\nop = "silu"\nuse = "broken"\n')
    with registry.isolated(a=whole_backend(), broken=BROKEN):
        result = call_command("plan", tiny, "--policy", path)
        insisting = call_command("plan", tiny, "--use", "silu=broken")
    assert result.code == 0
    assert f"rule 1 ({path}:1) asks for broken, which {FAULT}" in result.err
    assert_one_line_error(insisting, f"--use silu=broken asks for broken, which {FAULT}")


# What a policy both asks for and forbids.


def test_a_rule_that_asks_for_what_the_policy_forbids_is_told_of():
    plan = planned('forbid = "b"\n[[rule]]\nuse = ["b:f32", "a"]\n', more={"b": whole_backend()})
    assert plan.notes == ("rule 1 (p.toml:2) asks for b:f32, which forbid (p.toml:1) excludes",)
    assert plan.schedule(1, 1).steps[0].choice.name == "a:f32"


@pytest.mark.parametrize(
    "asked",
    [{"use": ["silu=b"]}, {"rule": '[[rule]]\nuse = "b"\non_unsupported = "error"\n'}],
    ids=["use", "rule"],
)
def test_asking_by_name_for_what_the_policy_forbids_is_an_error(asked):
    with pytest.raises(PolicyError, match=r"asks for b, which forbid \(p\.toml:1\) excludes"):
        planned('forbid = "b"\n' + asked.get("rule", ""), more={"b": whole_backend()}, use=asked.get("use", ()))


# What matches nothing.

UNMATCHED = {
    "no such op": ('[[rule]]\nop = "add"\nuse = "a"\n', (), "rule 1 (p.toml:1) matches no node of "),
    "too many rows": ('[[rule]]\nm = "9.."\nuse = "a"\n', (), "rule 1 (p.toml:1) matches no node of "),
    "a requirement": ('[[require]]\nop = "add"\nkernel = "a"\n', (), "requirement 1 (p.toml:1) matches no node of "),
    "several": (
        '[[rule]]\nop = "add"\nuse = "a"\n[[require]]\nlayer = 5\nkernel = "a"\n',
        ("mul=a",),
        "--use mul=a, rule 1 (p.toml:1), requirement 1 (p.toml:4) match no node of ",
    ),
    "an unknown backend": (
        '[[require]]\nkernel = ["b", "a"]\n',
        (),
        "p.toml:2: unknown backend 'b'; known: a, broken",
    ),
    "behind another": (
        '[[rule]]\nuse = "a"\n[[rule]]\nop = "silu"\nuse = "a:f32"\n',
        (),
        "p.toml:3: rule 2 is never reached: rule 1 (p.toml:1) matches all that it does",
    ),
    "an option twice": (
        "",
        ("silu=a", "silu=a:f32"),
        "--use silu=a is never reached: --use silu=a:f32 matches all that it does",
    ),
}


@pytest.mark.parametrize(("policy", "use", "said"), UNMATCHED.values(), ids=UNMATCHED)
def test_what_matches_no_node_is_told_of_in_one_line(policy, use, said):
    plan = planned(policy, use=use)
    (note,) = plan.notes
    assert note == (f"{said}{plan.graph.name} on cpu" if said.endswith("of ") else said)


@pytest.mark.parametrize(
    "policy",
    [
        '[[rule]]\nop = "silu"\nm = "8"\nuse = "a"\n',
        '[[rule]]\nop = "add"\ndevice = "cuda"\nuse = "a"\n',
        '[[rule]]\nop = "add"\ncapability = "9.0"\nuse = "a"\n',
        '[[require]]\ndevice = "cuda"\nkernel = "a"\n',
    ],
    ids=["few rows", "another device", "another card", "another device's requirement"],
)
def test_nothing_is_told_of_what_matches_or_is_for_another_device(policy):
    assert planned(policy).notes == ()


def test_nothing_is_told_of_the_default_policy_but_of_options_beside_it():
    with registry.isolated(torch=whole_backend()) as found:
        plain, asked = (
            make_plan(silu_graph(), default_policy().with_use(use), found, CPU) for use in ((), ("add=torch",))
        )
    assert plain.notes == ()
    assert asked.notes == (f"--use add=torch matches no node of {asked.graph.name} on cpu",)


# What no node gets.


def declining(reason="not today"):
    return {"b": whole_backend(silu=Declined(reason, kernel="f32"))}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"use": ["silu=b:f32"]}, "--use silu=b:f32: no node of one on cpu got b:f32: not today"),
        ({"use": ["silu=b"]}, "--use silu=b: no node of one on cpu got b: b:f32: not today"),
        ({"use": ["*=b:f32,b"]}, "--use *=b:f32,b: no node of one on cpu got b:f32 and b: not today"),
        (
            {"policy": '[[rule]]\nuse = "b"\non_error = "error"\n'},
            "rule 1 (p.toml:1): no node of one on cpu got b: b:f32: not today",
        ),
        (
            {"policy": '[[rule]]\nuse = "triton:f32"\n'},
            "rule 1 (p.toml:1) asks for triton:f32, and triton is not installed: pip install kernelmux-triton",
        ),
        (
            {"policy": '[[rule]]\nuse = ["triton", "a"]\n[defaults]\nuse = ["triton:f32", "a"]\n'},
            "rule 1 (p.toml:1) asks for triton, which is not installed: pip install kernelmux-triton",
        ),
        (
            {"policy": '[defaults]\nuse = ["triton", "a"]\n'},
            "defaults (p.toml:2) asks for triton, which is not installed: pip install kernelmux-triton",
        ),
        (
            {"policy": '[defaults]\nuse = ["b"]\n'},
            "defaults (p.toml:1): no node of one on cpu got b: b:f32: not today",
        ),
    ],
    ids=["a kernel", "a backend", "a list", "a rule", "not installed", "and told once", "of defaults", "defaults"],
)
def test_what_no_node_gets_though_it_is_named_is_told_of_with_the_first_reason(asked, said):
    plan = planned(more=declining(), **asked)
    assert plan.notes == (said,)
    assert plan.schedule(1, 1).steps[0].choice.name == "a:f32"


@pytest.mark.parametrize(
    "asked",
    [
        {"policy": '[[rule]]\nuse = "b"\non_unsupported = "next"\n'},
        {"policy": '[[rule]]\nuse = ["triton", "a"]\non_unsupported = "next"\n'},
        {"policy": '[[rule]]\nuse = ["triton", "a"]\ndevice = "cuda"\n'},
        {"policy": 'forbid = "triton"\n'},
        {"policy": '[[require]]\nkernel = ["triton", "a"]\n'},
        {"policy": '[[rule]]\nuse = "a"\n[defaults]\nuse = ["b"]\n'},
        {"policy": '[defaults]\nuse = ["b", "a"]\n'},
        {"use": ["silu=b,a"]},
        {"policy": '[[rule]]\nuse = "b"\nm = "1"\n[[rule]]\nuse = "a"\n', "use": ["silu=a"]},
    ],
    ids=[
        "next",
        "not installed, next",
        "not installed, for another device",
        "not installed, forbidden",
        "not installed, one of several to require",
        "defaults of no node",
        "defaults",
        "another of the list",
        "outranked by an option",
    ],
)
def test_nothing_is_told_of_what_may_decline(asked):
    assert planned(more=declining(), **asked).notes == ()


def test_a_kernel_that_one_row_count_gets_is_not_told_of():
    def silu(node, m):
        return FakeKernel() if m == 1 else Declined("one row", kernel="f32")

    assert planned(more={"b": whole_backend(silu=silu)}, use=["silu=b:f32"]).notes == ()


def test_an_option_is_served_by_the_fused_node_that_stands_for_those_that_it_names():
    with registry.isolated(a=whole_backend(), b=whole_backend()) as found:
        plan = plan_for(llama_graph(1), found, use=["*=b:f32"])
    assert "qkv_rope_copy" in {step.node.op for step in plan.schedule(1, 1).steps}
    assert plan.notes == ()


def test_the_command_line_says_what_no_node_gets(tiny):
    result = call_command("plan", tiny, "--use", "mul_mat=torch:int8")
    assert result.code == 0
    assert result.err.count("\n") == 1
    assert "--use mul_mat=torch:int8: no node of " in result.err
    assert "on cpu" in result.err
    assert "got torch:int8: it takes weights in " in result.err


TUNED = 'tuned_for = "cuda sm_90 NVIDIA H200"\n'
ELSEWHERE = (
    "the policy was measured on cuda sm_90 NVIDIA H200, the plan is for cpu: kernelmux tune MODEL measures one there"
)


def test_a_policy_that_was_measured_on_another_device_says_so():
    assert planned("fuse = true\n" + TUNED).notes == (f"p.toml:2: {ELSEWHERE}",)
    assert planned('tuned_for = "cpu"\n').notes == ()


def test_it_says_so_and_no_more_of_a_policy_that_extends_the_default():
    """Of the default's rules, of which some match nothing here, nobody asked for any."""
    with registry.isolated(torch=whole_backend()) as found:
        plan = plan_for(silu_graph(), found, f'extends = "default"\n{TUNED}')
    assert plan.notes == (f"p.toml:2: {ELSEWHERE}",)


def test_a_card_of_its_own_class_is_the_one_it_was_measured_on():
    card = described_device("cuda sm_90 NVIDIA H200")
    with registry.isolated(a=whole_backend()) as found:
        for device, count in ((card, 0), (described_device("cuda sm_90 NVIDIA H200, 66 processors"), 1)):
            assert len(make_plan(silu_graph(), parse_policy(TUNED, "p.toml"), found, device, 8).notes) == count


def test_policy_check_finds_it_where_a_model_is_planned():
    policy = parse_policy(TUNED, "p.toml")
    with registry.isolated(a=whole_backend()) as found:
        assert check_policy(policy, found, CPU) == []
        (finding,) = check_policy(policy, found, CPU, silu_graph())
    assert (finding.line, finding.message) == (1, ELSEWHERE)
