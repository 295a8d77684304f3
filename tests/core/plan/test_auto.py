"""`auto` takes what is predicted to be the fastest together: kernels, conversions and fusions, within its budget."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fake_backend import CPU, FakeKernel, FewRows, chain, graphs, llama_graph, plan_for, silu_graph, whole_backend
from kernelmux.conformance.testing import backend
from kernelmux.contract import Declined, registry
from kernelmux.contract.device import described_device
from kernelmux.errors import PlanError
from kernelmux.measure.predict import Predictor
from kernelmux.measure.table import Tables
from kernelmux.plan.auto import Auto
from kernelmux.plan.budget import added_error
from kernelmux.plan.offers import Offers
from kernelmux.plan.plan import make_plan
from kernelmux.policy.policy import default_policy, parse_policy
from kernelmux.run.model import load_random

AUTO = '[defaults]\nuse = ["auto"]\n'
APART = f"fuse = false\n{AUTO}"
FAST, SLOW = FakeKernel("fast", reading=0.9), FakeKernel("slow", reading=0.1)


def planned(graph, policy=AUTO, **backends):
    with registry.isolated(**backends) as found:
        return plan_for(graph, found, policy)


def kernels(plan, rows=1):
    return {step.node.name: step.choice.name for step in plan.schedule(rows, rows).steps}


def predicted(plan, rows=8):
    """Microseconds of a whole step: calls, conversions among them, and what storing values as they are adds."""
    predictor = Predictor(plan.device, Tables(plan.device))
    steps = plan.schedule(rows, rows).steps
    return sum(predictor.in_step(step.choice.kernel, step.node, rows_of(step.node, rows)).us for step in steps)


def rows_of(node, rows):
    return node.rows_in({"m": rows, "outs": rows})


def test_the_fastest_is_taken_whatever_its_backend_is_called_and_the_others_say_how_slow_they_are():
    choice = planned(silu_graph(), a=backend(silu=SLOW), b=backend(silu=FAST)).schedule(1, 1).steps[0].choice
    assert (choice.name, choice.reason) == ("b:fast", "least predicted time, by defaults (p.toml:1)")
    assert choice.predicted is not None
    (loser,) = choice.rejected
    assert (loser.kernel, loser.kind) == ("a:slow", "outranked")
    assert loser.reason.startswith("predicted ")
    assert "us (declared" in loser.reason


@pytest.mark.parametrize(
    ("rule", "taken"),
    [
        ('[[rule]]\nop = "silu"\nuse = "a:slow"\n', "a:slow"),
        ('[[rule]]\nop = "silu"\nuse = "auto"\n', "a:fast"),
        ('forbid = "a:fast"\n', "a:slow"),
    ],
)
def test_rules_stand_above_it(rule, taken):
    assert kernels(planned(silu_graph(), rule + AUTO, a=backend(silu=[FAST, SLOW]))) == {"y": taken}


def test_a_rough_kernel_is_not_taken_unless_the_policy_allows_its_error():
    rough = FakeKernel("rough", precision=1e-3, reading=0.9)
    a = backend(silu=[rough, SLOW])
    plan = planned(silu_graph(), a=a)
    assert kernels(plan) == {"y": "a:slow"}
    (loser,) = plan.schedule(1, 1).steps[0].choice.rejected
    assert (loser.kernel, loser.kind) == ("a:rough", "over budget")
    assert kernels(planned(silu_graph(), f"{AUTO}max_error = 1e-2\n", a=a)) == {"y": "a:rough"}


def test_a_kernel_that_is_no_faster_than_a_more_exact_one_is_never_taken():
    rough, exact = FakeKernel("rough", precision=1e-8), FakeKernel("exact", precision=1e-12)
    assert kernels(planned(silu_graph(), a=backend(silu=[rough, exact]))) == {"y": "a:exact"}


def test_a_fast_kernel_is_not_worth_two_conversions_alone_and_is_among_its_like():
    narrow = FakeKernel("narrow", takes=["bf16"], emits=["bf16"], reading=0.6)
    a = backend(silu=[FakeKernel("wide"), narrow], add=FakeKernel("wide"), convert=FakeKernel("f32"))
    alone = planned(chain("silu", columns=4096), a=a)
    assert kernels(alone) == {"n0": "a:wide"}
    many = kernels(planned(chain(*["silu"] * 40, columns=4096), a=a))
    assert {name for op, name in many.items() if not op.endswith("bf16")} >= {"a:narrow"}


@pytest.mark.parametrize(("reading", "kept"), [(0.5, True), (1e-5, False)])
def test_a_fused_kernel_is_taken_where_it_is_faster_than_its_parts(reading, kept):
    whole = whole_backend(add_rms_norm=FakeKernel("fused", reading=reading))
    plan = planned(llama_graph(2), a=whole)
    assert ("a:fused" in kernels(plan).values()) == kept


def test_a_second_packed_form_is_made_only_where_it_pays():
    """One kernel is better for few rows and the other for many: a little, or by far."""

    for worse, forms in ((1.05, 1), (20.0, 2)):
        few = FewRows("few", worse, packed="few", packed_bytes=10**6, reading=0.9)
        many = FakeKernel("many", packed="many", packed_bytes=10**6, reading=0.88)
        others = {"embed": FakeKernel(), "rms_norm": FakeKernel()}
        plan = planned(llama_graph(1), a=whole_backend(mul_mat=[few, many], **others))
        held = {}
        for weights, form in plan.packed_forms:
            for weight in weights:
                held.setdefault(weight, set()).add(form)
        assert max(map(len, held.values())) == forms


def second_form(policy=APART, device=CPU):
    """The plan where few rows and many want packed forms of their own, of some 10 MB each."""
    few = FakeKernel("few", packed="few", packed_bytes=10**6, reading=0.9)
    many = FakeKernel("many", packed="many", packed_bytes=10**6, reading=0.8)

    def offered(node, m):
        return [few if m <= 2 else Declined(f"it takes m ..2, not {m}", "shape", "few"), many]

    others = {"embed": FakeKernel(), "rms_norm": FakeKernel()}
    with registry.isolated(a=whole_backend(mul_mat=offered, **others)) as found:
        return make_plan(llama_graph(1), parse_policy(policy, "p.toml"), found, device, 64)


ONE_COPY = f"{APART}[weights]\ncopies = 1\n"


@pytest.mark.parametrize(
    ("policy", "memory", "said"),
    [
        (ONE_COPY, 10**9, "the policy allows 1"),
        (APART, 10**7, "cpu has 10.0 MB; a larger max_error may let in kernels that do with less"),
    ],
)
def test_steps_have_fewer_rows_where_more_need_a_packed_form_that_weights_may_not_have(policy, memory, said):
    plan = second_form(policy, replace(CPU, memory=memory))
    assert (plan.max_rows, plan.extra_copy_bytes) == (2, 0)
    assert "a:many" not in {step.choice.name for step in plan.steps}
    (note,) = plan.notes
    assert note.startswith("steps take up to 2 rows, not 64: for more, weights would need one more packed copy each, ")
    assert note.endswith(said)


def test_where_not_all_rows_can_be_had_a_second_form_must_pay_by_the_row():
    """At four rows a second form has room; read two by two without it prompts are as fast."""

    def offered(node, m, worth):
        few = FakeKernel("few", packed="few", packed_bytes=10**6, reading=0.9)
        some = FakeKernel("some", packed="some", packed_bytes=10**5, reading=worth)
        many = FakeKernel("many", packed="many", packed_bytes=10**8, reading=0.9)
        return [kernel for kernel, most in ((few, 2), (some, 4), (many, 64)) if m <= most]

    others = {"embed": FakeKernel(), "rms_norm": FakeKernel()}
    for worth, rows in ((0.9, 4), (0.0001, 2)):

        def answer(node, m, worth=worth):
            return offered(node, m, worth)

        with registry.isolated(a=whole_backend(mul_mat=answer, **others)) as found:
            policy = parse_policy(APART, "p.toml")
            plan = make_plan(llama_graph(1), policy, found, replace(CPU, memory=2 * 10**7), 64)
        assert plan.max_rows == rows


def test_weights_that_do_not_fit_are_told():
    plan = second_form(device=replace(CPU, memory=10**6))
    assert plan.notes[0] == "the weights do not fit: they take 8.0 MB, cpu has 1.0 MB"


def test_where_there_is_room_or_a_rule_asks_for_it_there_are_two():
    for plan in (
        second_form(device=replace(CPU, memory=10**9)),
        second_form(
            'fuse = false\n[[rule]]\nop = "mul_mat"\nm = "3.."\nuse = "a:many"\n' + AUTO,
            replace(CPU, memory=19 * 10**6),
        ),
    ):
        assert (plan.max_rows, plan.notes) == (64, ())
        assert plan.extra_copy_bytes > 0


def test_a_device_that_does_not_say_what_memory_it_has_gets_no_second_copy_unless_it_is_the_hosts():
    assert second_form(device=CPU).max_rows == 64
    bare = described_device("cuda sm_90 NVIDIA H200")
    object.__setattr__(bare, "memory", 0)
    assert second_form(device=bare).max_rows == 2


KINDS = st.builds(
    FakeKernel,
    st.just("k"),
    takes=st.sampled_from([None, ["bf16"], ["f32", "bf16"]]),
    # A graph's output is not rounded for speed, so that everybody can write float32.
    emits=st.sampled_from([None, ["f32", "bf16"], ["bf16", "f32"]]),
    reading=st.sampled_from([0.1, 0.3, 0.5, 0.9]),
)


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], deadline=None)
@given(graphs(), st.fixed_dictionaries({op: st.lists(KINDS, min_size=2, max_size=2) for op in ("silu", "add", "mul")}))
def test_what_the_choice_counted_is_what_the_plan_takes(monkeypatch, graph, changes):
    """Storage and conversions are settled as they were counted, at few rows and at many."""
    assigned, at = {}, Auto.at

    def noting(self, rows, held):
        assigned[rows] = at(self, rows, held)
        return assigned[rows]

    for drawn in changes.values():
        for number, kernel in enumerate(drawn):
            kernel.name = f"k{number}"
    with monkeypatch.context() as patched, registry.isolated(a=whole_backend(**changes, convert=FakeKernel())) as found:
        patched.setattr(Auto, "at", noting)
        plan = plan_for(graph, found, AUTO, max_rows=256)
    for top in plan.buckets:
        assert assigned[top].us == pytest.approx(predicted(plan, top))


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=25)
@given(graphs(), st.lists(st.fixed_dictionaries({"silu": KINDS, "add": KINDS, "mul": KINDS}), min_size=2, max_size=2))
def test_no_single_backend_is_predicted_to_be_faster(graph, changes):
    backends = {name: whole_backend(**changed) for name, changed in zip("ab", changes, strict=True)}
    with registry.isolated(**backends) as found:
        best = predicted(plan_for(graph, found, AUTO))
        for name in backends:
            alone = plan_for(graph, found, f'forbid = "{"ba"["ab".index(name)]}"\n[defaults]\nuse = "{name}"\n')
            assert best <= predicted(alone) * (1 + 1e-9)


RANKED = st.builds(
    FakeKernel,
    precision=st.sampled_from([1e-12, 1e-9, 1e-7]),
    takes=st.sampled_from([None, ["bf16"], ["f32", "bf16"], ["bf16", "f32"]]),
    emits=st.sampled_from([None, ["bf16"], ["f32", "bf16"], ["bf16", "f32"]]),
    # Equals are frequent.
    reading=st.sampled_from([0.3, 0.5]),
)
PER_OP = {op: st.lists(RANKED, min_size=2, max_size=3) for op in ("silu", "add", "mul", "mul_mat")}


def by_hand(graph, found, taken):
    """The plan in which each node gets the kernel that it is said to."""
    rules = "".join(f'[[rule]]\nnode = "{node}"\nuse = "{kernel}"\n' for node, kernel in taken.items())
    return plan_for(graph, found, f"fuse = false\n{rules}{AUTO}")


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=20)
@given(graphs(), st.fixed_dictionaries(PER_OP))
def test_whatever_the_formats_no_kernel_is_taken_that_is_no_faster_than_a_more_exact_one(graph, offered):
    """Put in place of what was taken, for all alike nodes and with all else as it is, it costs time."""
    # One that every budget allows.
    offered = {op: [*drawn, FakeKernel(precision=1e-8, reading=0.3)] for op, drawn in offered.items()}
    for drawn in offered.values():
        for number, kernel in enumerate(drawn):
            kernel.name = f"k{number}"
    with registry.isolated(a=whole_backend(**offered, convert=FakeKernel())) as found:
        plan = plan_for(graph, found, f"fuse = false\n{AUTO}")
        alike, kind = {}, Offers(found, CPU).kind
        for node in graph.ops:
            alike.setdefault(kind(node), []).append(node)
        for rows in (1, 8):
            taken = {name: kernel for name, kernel in kernels(plan, rows).items() if name in plan_nodes(graph)}
            best = predicted(by_hand(graph, found, taken), rows)
            for first, *others in alike.values():
                for kernel in offered.get(first.op, ()):
                    now = next(k for k in offered[first.op] if f"a:{k.name}" == taken[first.name])
                    if added_error(kernel, first) < added_error(now, first) and hands_back(kernel, first, graph):
                        put = {node.name: f"a:{kernel.name}" for node in (first, *others)}
                        assert predicted(by_hand(graph, found, taken | put), rows) > best + 1e-9, (put, taken)


def plan_nodes(graph):
    return {node.name for node in graph.ops}


def hands_back(kernel, node, graph):
    """Whether a kernel writes what the graph hands back as it is stated: others do not get that."""
    kept = any(value.name in graph.outputs for value in node.outputs)
    return not kept or all(
        value.format in formats for value, formats in zip(node.outputs, kernel.outputs(node), strict=True)
    )


def test_where_nobody_takes_a_node_every_refusal_is_told():
    with pytest.raises(PlanError, match=r"no kernel takes y \(silu of .*\) on cpu, by defaults .*: a:rough: its error"):
        planned(silu_graph(), a=backend(silu=FakeKernel("rough", precision=1e-2)))


def test_the_same_question_has_the_same_answer():
    backends = {"a": whole_backend(), "b": whole_backend(mul_mat=[FAST, SLOW])}
    prints = {planned(llama_graph(3), **dict(order)).fingerprint for order in itertools.permutations(backends.items())}
    assert len(prints) == 1
    assert CPU.kind == "cpu"


def test_a_kernel_that_has_raised_gives_way_to_the_next_fastest():
    plan = planned(silu_graph(), a=backend(silu=[FAST, SLOW]))
    with registry.isolated(a=backend(silu=[FAST, SLOW])):
        assert kernels(plan.without("y", "a:fast")) == {"y": "a:slow"}


def test_a_policy_that_extends_the_default_has_its_rules_behind_its_own():
    policy = parse_policy(
        'extends = "default"\n\n[[rule]]\nop = "silu"\nuse = "torch"\n\n[kv]\nformat = "f16"\n', "p.toml"
    )
    own, base = policy.document, default_policy().document
    assert [rule.use for rule in own.rule] == [("torch",), *(rule.use for rule in base.rule)]
    assert (own.defaults, own.kv.format) == (base.defaults, "f16")
    assert policy.where(0) == "rule 1 (p.toml:3)"
    assert policy.where(1) == "rule 2 (of the default)"


def test_asking_for_it_is_served_whatever_it_takes():
    with registry.isolated(a=whole_backend()) as found:
        plan = plan_for(llama_graph(1), found, use=["*=auto"])
    assert plan.notes == ()
    assert {step.choice.asked for step in plan.schedule(1, 1).steps} == {"auto"}


@pytest.mark.parametrize("shape", ["llama-8b:Q4_K_M", pytest.param("llama-8b:Q8_0", marks=pytest.mark.slow)])
def test_two_copies_are_enough_for_what_takes_two(shape):
    """Kernels that write side by side are kept apart from their parts, which would pack the weights a third time."""
    model, card = load_random(shape), described_device("cuda sm_90 NVIDIA H200")
    default = model.plan(device=card)
    two = model.plan(parse_policy('extends = "default"\n[weights]\ncopies = 2\n', "p.toml"), device=card)
    assert two.fingerprint == default.fingerprint


def test_logits_are_taken_from_no_kernel_whose_results_were_rounded_before_they_were_widened():
    class Widening(FakeKernel):
        rounds_to = "bf16"

    fast, slow = Widening("fast", reading=0.9), FakeKernel("slow", reading=0.1)
    found = kernels(planned(llama_graph(1), APART, a=whole_backend(mul_mat=[fast, slow])))
    assert found.pop("logits") == "a:slow"
    assert "a:fast" in found.values()
    # Who names it has meant it.
    named = planned(
        llama_graph(1), 'fuse = false\n[defaults]\nuse = ["a:fast"]\n', a=whole_backend(mul_mat=[slow, fast])
    )
    assert kernels(named)["logits"] == "a:fast"
