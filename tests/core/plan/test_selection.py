"""One node, many kernels: the policy's order decides, and everybody who lost is told why."""

import re

import pytest

from fake_backend import CPU, FakeKernel, chain, llama_graph, plan_for, silu_graph, whole_backend
from kernelmux.conformance.testing import backend
from kernelmux.contract import Declined, Kernel, registry
from kernelmux.contract.record import Record
from kernelmux.errors import BackendError, KernelmuxError, PlanError, PolicyError
from kernelmux.graph.graph import Builder
from kernelmux.plan.plan import make_plan
from kernelmux.plan.summary import summarise
from kernelmux.policy.policy import default_policy, parse_policy

FAST, EXACT = FakeKernel("fast", precision=1e-4), FakeKernel("exact")


def choose(policy="", *, use=(), graph=None, **backends):
    """The choice for the only node, with backends `a` (fast, exact) and `b` (exact) unless told."""
    backends = backends or {"a": backend(silu=[FAST, EXACT]), "b": backend(silu=EXACT)}
    with registry.isolated(**backends) as found:
        plan = plan_for(graph or silu_graph(), found, policy, use=use)
    return plan.schedule(1, 1).steps[0].choice


def losers(choice):
    return {loser.kernel: (loser.kind, loser.reason) for loser in choice.rejected}


def test_without_rules_the_first_backend_by_name_gets_the_node():
    choice = choose()
    assert (choice.name, choice.reason) == ("a:exact", "defaults (p.toml)")
    assert losers(choice) == {
        "a:fast": ("outranked", "a:exact comes first in defaults (p.toml)"),
        "b:exact": ("outranked", "a:exact comes first in defaults (p.toml)"),
    }


def test_of_a_backend_what_is_rough_comes_last_unless_it_is_named_or_allowed():
    """Who lists a backend has not asked for its least exact kernel; where it has no other, that serves."""
    assert choose('[defaults]\nuse = ["a"]\n').name == "a:exact"
    assert choose('[defaults]\nuse = ["a"]\nmax_error = 1e-3\n').name == "a:fast"
    assert choose('[defaults]\nuse = ["a:fast"]\n').name == "a:fast"
    assert choose('[defaults]\nuse = ["a"]\n', a=backend(silu=FAST)).name == "a:fast"


def test_defaults_set_the_order():
    assert choose('[defaults]\nuse = ["b", "a"]\n').name == "b:exact"


def test_a_kernel_that_defaults_name_does_not_hide_its_backends_others():
    choice = choose('[defaults]\nuse = ["a:exact"]\n')
    assert choice.name == "a:exact"
    assert losers(choice).keys() == {"a:fast", "b:exact"}


@pytest.mark.parametrize(
    ("text", "name", "reason"),
    [
        ('[[rule]]\nop = "silu"\nuse = "b"\n', "b:exact", "rule 1 (p.toml:1)"),
        ('\n[[rule]]\nop = "add"\nuse = "b"\n\n[[rule]]\nuse = "a:exact"\n', "a:exact", "rule 2 (p.toml:6)"),
        ('[[rule]]\nuse = ["a:exact", "b"]\n', "a:exact", "rule 1 (p.toml:1)"),
    ],
)
def test_a_rules_kernel_is_chosen_and_the_reason_names_rule_and_line(text, name, reason):
    choice = choose(text)
    assert (choice.name, choice.reason) == (name, reason)


def test_everybody_else_is_rejected_with_kind_and_reason():
    choice = choose(
        'forbid = "d"\n[[rule]]\nuse = ["b:small", "triton", "a:fast", "c"]\nmax_error = 1e-6\n',
        a=backend(silu=[FAST, EXACT]),
        b=backend(silu=[Declined("it takes 4 columns, not 8", "shape", "small"), EXACT]),
        c=backend(add=EXACT),
        d=backend(silu=EXACT),
    )
    assert choice.name == "a:exact"
    assert losers(choice) == {
        "b:small": ("shape", "it takes 4 columns, not 8"),
        "triton": ("missing dependency", "not installed: pip install kernelmux-triton"),
        "a:fast": ("over budget", "its error bound 0.0001 is over the budget 1e-06"),
        "c": ("not offered", "c has no silu"),
        "b:exact": ("outranked", "a:exact comes first in defaults (p.toml)"),
        "d:exact": ("forbidden", "the policy forbids it"),
    }


def test_a_whole_backend_that_declines_says_why():
    choice = choose('[[rule]]\nuse = "a"\n', a=backend(silu=Declined("no such card", "device")), b=backend(silu=EXACT))
    assert choice.name == "b:exact"
    assert losers(choice)["a"] == ("device", "no such card")


SMALL = {"a": backend(silu=Declined("too wide", "shape", "small")), "b": backend(silu=EXACT)}


@pytest.mark.parametrize("line", ["", 'on_unsupported = "next"\n'])
def test_where_a_rules_kernel_declines_the_defaults_follow(line):
    assert choose(f'[[rule]]\nuse = "a:small"\n{line}', **SMALL).name == "b:exact"


def test_on_unsupported_error_stops_with_the_reason():
    with pytest.raises(PlanError, match=r"y \(silu of x \[1, 8\] f32\).*rule 1 \(p\.toml:1\).*a:small: too wide"):
        choose('[[rule]]\nuse = "a:small"\non_unsupported = "error"\n', **SMALL)


def test_nobody_takes_it_lists_every_refusal():
    with pytest.raises(PlanError) as caught:
        choose(
            'forbid = "c"\n[defaults]\nmax_error = 1e-5\n',
            a=backend(silu=[Declined("too wide", "shape", "small"), FAST]),
            b=backend(add=EXACT),
            c=backend(silu=EXACT),
        )
    message = str(caught.value)
    assert "no kernel takes y (silu of x [1, 8] f32) on cpu" in message
    for refusal in ("a:small: too wide", "a:fast: its error bound", "b: b has no silu", "c:exact: the policy forbids"):
        assert refusal in message


def test_no_backend_at_all_says_what_to_install():
    with registry.isolated() as found, pytest.raises(BackendError, match="pip install kernelmux-torch"):
        plan_for(silu_graph(), found)


def test_only_a_broken_backend_says_what_broke_it():
    with registry.isolated(a=object()) as found, pytest.raises(BackendError, match=r"pip install .*; a: .*CONTRACT"):
        plan_for(silu_graph(), found)


# Names that do not exist.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('\n[[rule]]\nuse = "aa"\n', r"^p\.toml:3: unknown backend 'aa' \(did you mean 'a'\?\); known: a, b"),
        ('[[rule]]\nuse = "aa:fast"\n', r"^p\.toml:2: unknown backend 'aa'"),
        ('[defaults]\nuse = "aa"\n', r"p\.toml.*unknown backend 'aa' \(did you mean 'a'\?\)"),
        ('[[rule]]\nuse = "a:fats"\n', r"^p\.toml:2: unknown kernel 'a:fats' \(did you mean 'a:fast'\?\)"),
        ('[[rule]]\nuse = "a:fats"\non_unsupported = "error"\n', r"^p\.toml:2: .*did you mean 'a:fast'"),
        ('[defaults]\nuse = "a:fats"\n', r"p\.toml.*unknown kernel 'a:fats' \(did you mean 'a:fast'\?\)"),
        ('forbid = "aa"\n', r"p\.toml.*unknown backend 'aa' \(did you mean 'a'\?\)"),
        ('forbid = "a:fats"\n', r"p\.toml.*unknown kernel 'a:fats' \(did you mean 'a:fast'\?\)"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest_spelling(text, message):
    with pytest.raises(PolicyError, match=message):
        choose(text)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("silu=aa", r"--use silu=aa: unknown backend 'aa'"),
        ("silu=triton", r"--use silu=triton: unknown backend 'triton'"),
        ("silu=a:fats", r"--use silu=a:fats: unknown kernel .*did you mean 'a:fast'"),
    ],
)
def test_an_unknown_name_on_the_command_line_is_an_error_too(use, message):
    with pytest.raises(PolicyError, match=message):
        choose(use=[use])


def test_an_official_backend_that_is_not_installed_is_passed_over():
    choice = choose('[[rule]]\nuse = ["cupy", "b"]\n[defaults]\nuse = ["numba"]\n')
    assert choice.name == "b:exact"
    assert losers(choice)["cupy"][0] == losers(choice)["numba"][0] == "missing dependency"


def test_a_rule_that_says_next_may_name_a_backend_that_is_not_installed():
    assert choose('[[rule]]\nuse = ["mine"]\non_unsupported = "next"\n').name == "a:exact"


def test_a_rule_for_an_op_that_the_graph_lacks_is_no_mistake():
    """One policy file serves many models: what this graph does not use cannot be checked against it."""
    text = '[[rule]]\nop = "mul_mat"\nuse = "a:int4"\n'
    assert choose(text, a=backend(silu=FAST, mul_mat=FakeKernel("int4"))).name == "a:fast"


def test_the_default_policy_plans_a_graph_without_mul_mat():
    with registry.isolated(torch=whole_backend()) as found:
        assert make_plan(chain("silu", "add"), default_policy(), found, CPU).schedules


# What narrows the choice.


def test_use_on_the_command_line_outranks_the_file():
    choice = choose('[[rule]]\nop = "silu"\nuse = "b"\n', use=["silu=a:exact"])
    assert (choice.name, choice.reason) == ("a:exact", "--use silu=a:exact")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('forbid = "a"\n', "b:exact"),
        ('forbid = ["a:fast"]\n', "a:exact"),
        ('forbid = "a"\n[[rule]]\nuse = "a"\n', "b:exact"),
        ("[defaults]\nmax_error = 1e-3\n", "a:fast"),
        ("[defaults]\nmax_error = 1e-6\n", "a:exact"),
        ('[[rule]]\nuse = "a"\nmax_error = 1e-6\n[defaults]\nmax_error = 1.0\n', "a:exact"),
        ('[[rule]]\nuse = "a"\nmax_error = 1.0\n[defaults]\nmax_error = 1e-6\n', "a:fast"),
    ],
)
def test_forbidden_and_over_budget_kernels_are_not_chosen(text, name):
    assert choose(text).name == name


def test_nodes_that_are_alike_ask_a_backend_once():
    asked = []

    def answer(node, m):
        asked.append((node.op, m))
        return EXACT

    b = Builder("g")
    value = b.leaf("x", ("m", 8), role="state")
    for layer in range(5):
        value = b.value("silu", f"blk.{layer}", value, layer=layer)
    choose(graph=b.build(value), a=backend(silu=answer))
    assert len(asked) == len(set(asked))


def test_a_kernel_is_asked_about_with_the_rows_of_its_bucket():
    seen = []

    def answer(node, m):
        seen.append((m, node.inputs[0].extents, node.outputs[0].extents))
        return EXACT

    choose(a=backend(silu=answer))
    assert seen
    assert all(inputs == outputs == (m, 8) for m, inputs, outputs in seen)


class _Undeclared(Kernel):
    """A kernel whose author forgot to state its precision."""

    name = "k"

    def bind(self, node, tensors, stream):
        return lambda: None


def test_a_kernel_that_declares_no_precision_is_named():
    with pytest.raises(KernelmuxError, match="precision"):
        choose(a=backend(silu=_Undeclared()))


AUTO = '[defaults]\nuse = "auto"\n'
FAILED = (
    r"^its smoke cases failed here on \d{4}-\d\d-\d\d \(silu-m5\): kernelmux check --kernel a:fast --op silu --smoke"
)


def planned_beside_a_failure(policy, *, use=(), op="silu", name="a:fast", graph=None, **backends):
    """A plan where a smoke case of a kernel has failed; `policy` is a text or a policy."""
    backends = backends or {"a": backend(silu=[FakeKernel("fast", reading=0.9), FakeKernel("slow", reading=0.1)])}
    with registry.isolated(**backends) as found:
        Record(found, CPU).note(op, name, "silu-m5")
        asked = parse_policy(policy, "p.toml") if isinstance(policy, str) else policy
        return make_plan(graph or silu_graph(), asked.with_use(use), found, CPU, 8)


@pytest.mark.parametrize(
    "policy",
    [
        AUTO,
        '[[rule]]\nuse = "auto"\n',
        'extends = "default"\n[[rule]]\nop = "mul"\nuse = "a:fast"\n',
        "",
        default_policy(),
    ],
    ids=["auto", "a rule's auto", "extends the default", "by name of the backend", "the default"],
)
def test_nobody_gets_a_kernel_whose_smoke_cases_failed_here_without_asking_for_it(policy):
    plan = planned_beside_a_failure(policy)
    (choice,) = (step.choice for step in plan.schedule(1, 1).steps)
    assert choice.name == "a:slow"
    kind, reason = losers(choice)["a:fast"]
    assert kind == "failed"
    assert re.match(FAILED, reason)
    assert not any("smoke" in note for note in plan.notes)


def test_a_summary_names_a_kernel_whose_failure_keeps_it_from_a_node_and_what_it_would_save():
    plan = planned_beside_a_failure(AUTO, graph=silu_graph(columns=1 << 20))
    (said,) = (line for line in summarise(plan).missed if "smoke" in line)
    assert said.startswith("a:fast is kept from y: its smoke cases failed here")
    assert re.search(r"would take \d\d% less$", said)


@pytest.mark.parametrize(
    ("asked", "by"),
    [
        ({"policy": '[[rule]]\nuse = "a:fast"\n'}, r"rule 1 \(p\.toml:1\)"),
        ({"policy": '[[rule]]\nuse = "a"\n' + AUTO}, r"rule 1 \(p\.toml:1\)"),
        ({"policy": '[defaults]\nuse = ["a", "auto"]\n'}, r"defaults \(p\.toml:1\)"),
        ({"policy": AUTO, "use": ["silu=a:fast"]}, "--use silu=a:fast"),
        ({"policy": default_policy(), "use": ["silu=a"]}, "--use silu=a"),
    ],
    ids=["a rule", "a rule's backend", "defaults", "an option", "an option beside the default"],
)
def test_who_names_it_gets_it_and_is_told(asked, by):
    plan = planned_beside_a_failure(**asked)
    assert plan.schedule(1, 1).steps[0].choice.name == "a:fast"
    (note,) = plan.notes
    assert re.match(rf"^a:fast runs silu, by {by}: {FAILED[1:]}", note)


def test_a_fused_kernel_that_failed_leaves_its_parts_to_run():
    for policy in (AUTO, '[defaults]\nuse = "a"\n'):
        fused = {"graph": llama_graph(1), "op": "gate_up_swiglu", "name": "a:f32"}
        plan = planned_beside_a_failure(policy, **fused, a=whole_backend())
        assert "gate_up_swiglu" not in {step.node.op for step in plan.schedule(1, 1).steps}
        assert "a:f32 of gate_up_swiglu: its smoke cases failed here" in " ".join(plan.why("blk.0.ffn_up").split())


def test_where_it_was_the_only_one_there_is_no_plan_and_the_reason_says_what_runs_the_cases_again():
    with pytest.raises(PlanError, match=r"a:fast: its smoke cases failed here .* kernelmux check --kernel a:fast"):
        planned_beside_a_failure(AUTO, a=backend(silu=FAST))
