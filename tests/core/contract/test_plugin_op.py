"""A backend that brings a fused op of its own: matched, planned, walked and tested, without a change to core."""

import types

import pytest
import torch

from fake_backend import CPU, FakeKernel, chain, compute, plan_for, whole_backend
from kernelmux.conformance import run_case
from kernelmux.conformance.testing import backend
from kernelmux.contract import CONTRACT, hookimpl, registry
from kernelmux.contract.packed import PackedWeights
from kernelmux.errors import BackendError, PlanError, PolicyError
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import Builder
from kernelmux.graph.ops import CORE_OPS, OPS, Case, Fused, Part
from kernelmux.graph.ops.op import Elementwise
from kernelmux.plan.check import check_policy
from kernelmux.plan.lock import read_lock, write_lock
from kernelmux.policy.policy import parse_policy
from kernelmux.run.walker import Walker


class AddSilu(Fused):
    """y = silu(a + b).

    Axes: m rows, n columns.
    Inputs: a, b [m, n].
    Outputs: y [m, n]; may be a's or b's memory.
    """

    name = "add_silu"
    inputs = ("a", "b")
    outputs = ("y",)
    in_place = ((0, 0), (1, 0))
    pattern = (Part("add", ("a", "b"), ("sum",)), Part("silu", ("sum",), ("y",)))

    told = Elementwise.told

    def cases(self):
        for m, n in ((1, 16), (3, 5)):
            yield Case(f"add_silu-m{m}-n{n}", self.name, (Value("a", (m, n)), Value("b", (m, n))))


def plugin(op=AddSilu, hook=None, **others):
    """A backend that has a kernel for add_silu, which it brings, and what `others` say."""
    made = backend(**others)
    made.new_ops = hookimpl(lambda: [op() if isinstance(op, type) else op])
    if hook is None:

        def hook(node, m, n, device):
            return FakeKernel("mine", work=compute)

    made.dispatch_add_silu = hookimpl(hook)
    return made


PLAIN = {op: FakeKernel(work=compute) for op in ("add", "silu", "mul")}


def graph():
    """y = silu(a + b) * a: n0+n1 is a place for the op."""
    b = Builder("g")
    first, second = (b.leaf(name, ("m", 8), role="state") for name in "ab")
    return b.build(b.value("mul", "n2", b.value("silu", "n1", b.value("add", "n0", first, second)), first))


def ops(plan, rows=1):
    return {step.node.name: step.choice.name for step in plan.schedule(rows, rows).steps}


# It works.


def test_its_op_is_matched_planned_and_walked():
    a, b = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    with registry.isolated(mine=plugin(**PLAIN)) as found:
        plan = plan_for(graph(), found)
        walk = Walker(plan, PackedWeights({}, CPU), {"a": a.clone(), "b": b.clone()}).bind(m=4)
        launches = walk()
    assert ops(plan) == {"n0+n1": "mine:mine", "n2": "mine:f32"}
    assert plan.fused == {"n0+n1": ("n0", "n1")}
    assert launches == 2
    torch.testing.assert_close(walk.outputs["n2"], torch.nn.functional.silu(a + b) * a)


def test_its_kernel_is_tested_with_its_cases():
    with registry.isolated(mine=plugin(**PLAIN)) as found:
        results = [run_case(case, "mine:mine", found) for case in OPS["add_silu"].cases()]
    assert len(results) == 2
    assert all(result.passed for result in results)


def test_a_wrong_kernel_fails_its_cases():
    def wrong(node, tensors):
        torch.add(tensors.inputs[0], tensors.inputs[1], out=tensors.outputs[0])

    with registry.isolated(mine=plugin(hook=lambda m: FakeKernel("mine", work=wrong), **PLAIN)) as found:
        assert not run_case(next(AddSilu().cases()), "mine:mine", found).passed


def test_its_hook_is_told_what_the_op_says():
    told = []

    def hook(n, m, node, device):
        told.append((m, n, node.op, device.kind))
        return FakeKernel("mine")

    with registry.isolated(mine=plugin(hook=hook, **PLAIN)) as found:
        plan_for(graph(), found, max_rows=2)
    assert set(told) == {(1, 8, "add_silu", "cpu"), (2, 8, "add_silu", "cpu")}


POLICIES = {
    "another backend's plain ops": ('[defaults]\nuse = ["plain"]\n', False),
    "a rule for the op": ('[[rule]]\nop = "add_silu"\nuse = "mine"\n\n[defaults]\nuse = ["plain"]\n', True),
    "a rule for one kernel": ('[[rule]]\nop = "add_silu"\nuse = "mine:mine"\n\n[defaults]\nuse = ["plain"]\n', True),
    "no fusions": ('fuse = false\n[defaults]\nuse = ["mine"]\n', False),
    "forbidden": ('forbid = "mine:mine"\n[defaults]\nuse = ["mine"]\n', False),
}


@pytest.mark.parametrize(("policy", "fused"), POLICIES.values(), ids=POLICIES)
def test_a_policy_speaks_of_it_as_of_any_op(policy, fused):
    with registry.isolated(mine=plugin(**PLAIN), plain=backend(**PLAIN)) as found:
        assert ("n0+n1" in ops(plan_for(graph(), found, policy))) == fused
        assert check_policy(parse_policy(policy, "p.toml"), found, CPU, graph()) == []


def test_a_policy_that_names_it_without_its_backend_says_so():
    with (
        registry.isolated(a=whole_backend()),
        pytest.raises(PolicyError, match=r"^p\.toml:2: op: unknown op 'add_silu'"),
    ):
        parse_policy('[[rule]]\nop = "add_silu"\nuse = "mine"\n', "p.toml")


def test_a_plan_with_it_is_locked_and_refused_where_its_backend_is_gone(tmp_path):
    with registry.isolated(mine=plugin(**PLAIN)) as found:
        plan = plan_for(graph(), found, '[defaults]\nuse = "mine"\n')
        write_lock(plan, tmp_path / "p.json")
        again = read_lock(tmp_path / "p.json", graph(), found, CPU)
    assert (again.fingerprint, ops(again)) == (plan.fingerprint, ops(plan))
    with registry.isolated(mine=backend(**PLAIN)) as found, pytest.raises(PlanError) as caught:
        read_lock(tmp_path / "p.json", graph(), found, CPU)
    assert "\n" not in str(caught.value)


def test_where_it_and_a_core_op_want_one_node_one_of_them_gets_it():
    """silu belongs to n0+n1 of add_silu and to n1+n2 of swiglu."""
    with registry.isolated(mine=plugin(swiglu=FakeKernel(work=compute), **PLAIN)) as found:
        plan = plan_for(graph(), found)
    assert set(ops(plan)) in ({"n0+n1", "n2"}, {"n0", "n1+n2"})


# It leaves nothing behind.


def test_isolated_takes_its_op_away_again():
    before, core = dict(OPS), whole_backend()
    with registry.isolated(mine=plugin(**PLAIN)):
        assert isinstance(OPS["add_silu"], AddSilu)
        with registry.isolated(a=core) as inner:
            assert set(OPS) == CORE_OPS
            assert set(ops(plan_for(graph(), inner))) == {"n0", "n1+n2"}
        assert "add_silu" in OPS
    assert before == OPS
    assert "add_silu" not in OPS


def test_one_backend_works_in_two_registries_one_after_another():
    shared = plugin(**PLAIN)
    for _ in range(2):
        with registry.isolated(mine=shared) as found:
            assert found.working == ("mine",)
            assert "n0+n1" in ops(plan_for(graph(), found))


def test_a_registry_without_its_backend_knows_nothing_of_it():
    """Beside the process's registry, in which the op is known."""
    with registry.isolated(mine=plugin(**PLAIN)):
        other = registry.Registry()
        other.register(backend(**PLAIN), "other")
        assert ops(plan_for(graph(), other)) == {"n0": "other:f32", "n1": "other:f32", "n2": "other:f32"}


# What a broken one does.


def _misspelt(node, m, columns):
    return FakeKernel("mine")


class _Clash(AddSilu):
    name = "add"


class _Odd(AddSilu):
    def cases(self):
        yield Case("add_silu-odd", self.name, (Value("a", (1, 8)), Value("b", (1, 9))))


class _Dangling(AddSilu):
    pattern = (Part("add", ("a", "b"), ("sum",)), Part("silu", ("summ",), ("y",)))


class _Unproduced(AddSilu):
    pattern = (Part("add", ("a", "b"), ("sum",)), Part("silu", ("sum",), ("z",)))


class _Doubled(AddSilu):
    pattern = (Part("add", ("a", "b"), ("sum", "rest")), Part("silu", ("sum",), ("y",)))


class _Caseless(AddSilu):
    def cases(self):
        return iter(())


BROKEN = {
    "an argument that the op does not have": (plugin(hook=_misspelt), "columns"),
    "a core op's name": (plugin(_Clash()), "it brings an op named 'add', which exists already"),
    "no op at all": (
        plugin(types.SimpleNamespace(name="add_silu")),
        "bad.new_ops() lists namespace(name='add_silu') (SimpleNamespace): it must list instances of Op",
    ),
    "a value that nothing produces": (
        plugin(_Dangling),
        "the pattern of 'add_silu': silu reads 'summ' (did you mean 'sum'?); known: a, b, sum",
    ),
    "an output that nothing produces": (plugin(_Unproduced), "'add_silu' does not produce the output 'y'; known: a,"),
    "one output too many": (plugin(_Doubled), "the pattern of 'add_silu': add has outputs y; 2 are named"),
    "a case that is no node": (plugin(_Odd), "GraphError"),
    "no cases": (plugin(_Caseless), "add_silu"),
}


@pytest.mark.parametrize(("broken", "fault"), BROKEN.values(), ids=BROKEN)
def test_a_broken_one_is_quarantined_leaves_no_op_and_the_others_work(broken, fault):
    with registry.isolated(bad=broken, good=backend(**PLAIN)) as found:
        assert fault in found.backends["bad"].fault
        assert found.working == ("good",)
        assert ops(plan_for(graph(), found)) == {"n0": "good:f32", "n1": "good:f32", "n2": "good:f32"}
        assert set(OPS) == CORE_OPS


def test_a_notebook_may_register_it_again_once_it_is_mended():
    with registry.isolated():
        with pytest.raises(BackendError, match="columns"):
            registry.register(plugin(hook=_misspelt), "mine")
        # The cell is run again, and so the class is another one of the same name.
        again = type("AddSilu", (AddSilu,), {})
        assert registry.register(plugin(again, **PLAIN), "mine").fault == ""
        assert "n0+n1" in ops(plan_for(graph(), registry.current()))


def test_two_backends_may_not_bring_different_ops_of_one_name():
    other = type("Other", (AddSilu,), {"pattern": (*AddSilu.pattern[:1], Part("silu", ("sum",), ("y",)))})
    with registry.isolated(one=plugin(**PLAIN), two=plugin(other)) as found:
        assert found.working == ("one",)
        assert "'add_silu', which exists already" in found.backends["two"].fault


def test_two_backends_may_bring_the_very_same_op():
    """Neither can rely on the other's being installed."""
    with registry.isolated(one=plugin(), two=plugin(**PLAIN)) as found:
        assert found.working == ("one", "two")
        policy = '[[rule]]\nop = "add_silu"\nuse = ["two", "one"]\n'
        assert ops(plan_for(graph(), found, policy))["n0+n1"] == "two:mine"


def test_a_hook_for_an_op_that_nobody_brings_is_told_of_its_name():
    made = backend(**PLAIN)
    made.dispatch_add_silu = hookimpl(lambda node: FakeKernel())
    with registry.isolated(mine=made, good=backend(**PLAIN)) as found:
        assert "dispatch_add_silu is no hook" in found.backends["mine"].fault


def test_a_backend_of_nothing_but_its_own_op_is_a_backend():
    with registry.isolated(mine=plugin(), plain=backend(**PLAIN)) as found:
        assert found.working == ("mine", "plain")
        assert found.ops("mine") == ("add_silu",)
        assert CONTRACT == found.backends["mine"].plugin.CONTRACT
        assert ops(plan_for(chain("add", "silu"), found)) == {"n0": "plain:f32", "n1": "plain:f32"}
