"""What backends may answer: each mistake is one line that says which function made it, and what was expected of it."""

import re
import types
from functools import partial

import pytest
import torch

from fake_backend import CPU, FakeKernel, plan_for, silu_graph
from kernelmux.conformance.run import run_case
from kernelmux.conformance.testing import backend, one_node
from kernelmux.contract import CONTRACT, Declined, Device, Kernel, Tensors, hookimpl, registry
from kernelmux.contract.answers import bound, prepared
from kernelmux.errors import BackendError
from kernelmux.graph.formats import Format, Value
from kernelmux.graph.ops import OPS

ADD = one_node("add", Value("a", (1, 8)), Value("b", (1, 8)))
SILU = one_node("silu", Value("x", (4, 8)))

# What lists of classes, ops and formats must be.


class Listed(Kernel):
    """A kernel of silu for a few rows, on any device."""

    ops = ("silu",)
    name = "f32"
    precision = 1e-9
    takes = {"m": "..4"}

    def bind(self, node, tensors, stream):
        raise AssertionError("nothing is bound here")


def variation(**declared):
    return type("Varied", (Listed,), declared)


def listing(answer, **others):
    """A backend whose kernel_classes returns that, as it is, or what it returns where it is a function."""
    hook = answer if isinstance(answer, types.FunctionType) else lambda: answer
    return types.SimpleNamespace(CONTRACT=CONTRACT, kernel_classes=hookimpl(hook), **others)


def _fails():
    raise ImportError("no module of that name")


LISTS = {
    "an exception": (_fails, "ImportError: no module of that name (test_answers.py:"),
    "nothing": (
        lambda: None,
        "bad.kernel_classes() returned None (is a `return` missing?): it must return a list of Kernel classes",
    ),
    "a class": (Listed, "bad.kernel_classes() returned the class Listed: it must return a list of Kernel classes"),
    "an instance": ([Listed()], "bad.kernel_classes() lists an instance of Listed: it must list Kernel classes"),
    "a name": ([Listed, "f64"], "bad.kernel_classes() lists 'f64' (str): it must list Kernel classes, [MyKernel]"),
    "no op": ([variation(ops=())], "bad:f32.ops names no op: say which it implements, as ops = ('add',)"),
    "an op that is none": ([variation(ops=("silo",))], "bad:f32.ops: unknown op 'silo' (did you mean 'silu'?)"),
    "ops as a word": ([variation(ops="silu")], "bad:f32.ops must be a tuple of names, ('silu',)"),
    "no bind": (
        [type("Bare", (Kernel,), {"ops": ("silu",), "name": "bare", "precision": 0})],
        "bad:bare has no bind: a kernel must define it",
    ),
    "no name": ([variation(name="")], "bad:Varied.name must be a name without its backend, not ''"),
    "a full name": ([variation(name="bad:f32")], "bad:Varied.name must be a name without its backend, not 'bad:f32'"),
    "no precision": ([variation(precision=None)], "bad:f32.precision must be a bound on the NMSE, not None"),
    "an efficiency that is a number": (
        [variation(efficiency=7)],
        "bad:f32.efficiency must be an Efficiency(reading=0.7, multiplying=0.3), not 7 (int)",
    ),
    "launches below none": ([variation(launches=-1)], "bad:f32.launches must be a number of launches, not -1 (int)"),
    "devices as a word": ([variation(devices="cpu")], "bad:f32.devices must be a tuple of kinds, ('cpu',), not 'cpu'"),
    "a version that is a number": ([variation(version=3)], "bad:f32.version must be a str, not 3 (int)"),
    "a packed name that is a number": ([variation(packed=7)], "bad:f32.packed must be a str, not 7 (int)"),
    "rounding to no format": ([variation(rounds_to="nope")], "bad:f32.rounds_to must be the name of a format, as"),
    "takes in a list": ([variation(takes=[])], "bad:f32.takes must be a dict, {'m': '..64'}, not [] (list)"),
    "two of a name": ([Listed, variation()], "two kernels of silu are named bad:f32"),
    "words that are no range": (
        [variation(takes={"m": "1-5"})],
        "bad:f32.takes: m is a number, '1-5' is no range: write 5, '1..16', '17..' or '..16'",
    ),
    "half a range": ([variation(takes={"n": "1..x"})], "bad:f32.takes: n is a number, '1..x' is no range: write 5"),
    "a number as a word": ([variation(takes={"m": "5"})], "bad:f32.takes: m is a number, '5' is no range: write 5"),
    "a range in a list": ([variation(takes={"m": (4, "8..")})], "bad:f32.takes: m is a number, '8..' in a list is"),
    "what its op is not told": ([variation(takes={"rows": 4})], "bad:f32.takes: no op of its is told 'rows'"),
}


@pytest.mark.parametrize(("answer", "fault"), LISTS.values(), ids=LISTS)
def test_a_list_of_classes_that_is_none_says_what_was_expected_and_the_others_answer(answer, fault):
    with registry.isolated(bad=listing(answer), good=backend(silu=FakeKernel())) as found:
        offer = found.offer(SILU, CPU)
        assert list(offer.kernels) == ["good:f32"]
        assert offer.declined["bad"].reason.startswith("quarantined: ")
        assert fault in found.backends["bad"].fault
        assert found.ops("bad") == ()


BROUGHT = {
    "no list of ops": (
        {"new_ops": None},
        "bad.new_ops() returned None (is a `return` missing?): it must return a list of",
    ),
    "a class of ops": ({"new_ops": [Kernel]}, "bad.new_ops() lists the class Kernel: it must list instances of Op"),
    "no list of formats": ({"new_formats": 3}, "bad.new_formats() returned 3 (int): it must return a list of Formats"),
    "a format's name": ({"new_formats": ["q"]}, "bad.new_formats() lists 'q' (str): it must list instances of Format"),
    "half a format": ({"new_formats": [Format("q", ())]}, "its format 'q' needs `dequantize` and `draw`"),
    "core's format": ({"new_formats": [Format("q4_k", ())]}, "it brings a format named 'q4_k', which exists already"),
}


@pytest.mark.parametrize(("hooks", "fault"), BROUGHT.values(), ids=BROUGHT)
def test_what_it_brings_is_checked_at_once(hooks, fault):
    made = {name: hookimpl(lambda answer=answer: answer) for name, answer in hooks.items()}
    with registry.isolated(bad=listing([Listed], **made)) as found:
        assert fault in found.backends["bad"].fault


# What classes answer.


def answers(classes, node=SILU, device=CPU, **others):
    """Each kernel, or its refusal, by its name."""
    with registry.isolated(a=listing(classes, **others)) as found:
        offer = found.offer(node, device)
        assert not found.backends["a"].fault
    return {name.removeprefix("a:"): answer for name, answer in (*offer.kernels.items(), *offer.declined.items())}


REFUSED = {
    "rows": ({"takes": {"m": "..3"}}, "shape", "it takes m ..3, not 4"),
    "another kind of device": ({"devices": ("cuda",)}, "device", "it runs on cuda, the plan is for cpu"),
    "what it says itself": (
        {"refuses": lambda self, node: Declined(f"not of {node.rows} rows on {self.device.kind}", "alignment")},
        "alignment",
        "not of 4 rows on cpu",
    ),
}


@pytest.mark.parametrize(("declared", "kind", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_class_is_refused_by_what_it_declares_and_by_what_it_says(declared, kind, reason):
    found = answers([variation(name="other"), variation(**declared)])
    assert isinstance(found["other"], Kernel)
    assert found["f32"] == Declined(reason, kind, "f32")


def test_a_class_for_newer_cards_is_refused_on_an_older_one():
    old, new = (Device("cuda", 0, "card", (major, 0)) for major in (7, 9))
    classes = [variation(capability=(8, 0))]
    assert isinstance(answers(classes, device=new)["f32"], Kernel)
    assert answers(classes, device=old)["f32"].reason == "it needs compute capability 8.0, card has 7.0"


def test_classes_come_in_their_order_but_for_those_that_come_late():
    late = variation(name="late", comes_late=lambda self, node: node.rows == 4)
    assert list(answers([late, variation(name="a"), variation(name="b")])) == ["a", "b", "late"]


def test_a_backend_that_refuses_a_device_is_not_asked_for_its_classes():
    refusal = hookimpl(lambda device: Declined("too old", "capability"))
    assert answers(_fails, device_refusal=refusal) == {"a": Declined("too old", "capability")}


def test_a_refusal_that_is_none_says_what_was_expected():
    with registry.isolated(bad=listing([Listed], device_refusal=hookimpl(lambda device: True))) as found:
        found.offer(SILU, CPU)
        assert "bad.device_refusal returned True: it must return Declined or None" in found.backends["bad"].fault


def test_a_hook_of_its_own_answers_for_its_op_alone():
    own = hookimpl(lambda node: FakeKernel("own"))
    both = [variation(ops=("silu", "add"), takes={})]
    assert list(answers(both, dispatch_silu=own)) == ["own"]
    assert list(answers(both, ADD, dispatch_silu=own)) == ["f32"]


# What a kernel's methods return.


SIGNATURES = {
    "too few": (
        "bind",
        lambda self, node, tensors: None,
        "(self, node, tensors) must take (self, node, tensors, stream)",
    ),
    "too many": ("outputs", lambda self, node, more: [["f32"]], "(self, node, more) must take (self, node)"),
    "no self": ("refuses", lambda node: None, "(node) must take (self, node)"),
}


@pytest.mark.parametrize(("method", "wrong", "said"), SIGNATURES.values(), ids=SIGNATURES)
def test_a_method_that_core_cannot_call_is_told_by_its_own_line(method, wrong, said):
    line = wrong.__code__.co_firstlineno
    with registry.isolated(bad=listing([variation(**{method: wrong})])) as found:
        found.offer(SILU, CPU)
        assert f"bad:f32.{method}{said} (test_answers.py:{line})" in found.backends["bad"].fault
    own = type("Own", (FakeKernel,), {method: wrong})()
    with registry.isolated(bad=backend(silu=own)) as found:
        found.offer(SILU, CPU)
        assert f"bad:f32.{method}{said} (test_answers.py:{line})" in found.backends["bad"].fault


def test_a_method_may_take_more_where_that_has_a_default():
    wider = variation(refuses=lambda self, node, deeply=False: None, workspace=lambda *anything: 0)
    assert list(answers([wider])) == ["f32"]


def test_a_bind_that_forgets_to_return_is_told_by_the_kernels_name():
    class Forgets(Listed):
        def bind(self, node, tensors, stream):
            partial(torch.sigmoid, *tensors.inputs, out=tensors.outputs[0])

    x = torch.zeros(4, 8)
    wanted = r"^a:f32\.bind returned None \(is a `return` missing\?\): it must return a call without arguments"
    kernel = Forgets()
    kernel.backend = "a"
    with pytest.raises(BackendError, match=wanted) as caught:
        bound(kernel, SILU, Tensors((x,), (x,)), None)
    assert (caught.value.node, caught.value.kernel) == (SILU.name, "a:f32")


@pytest.mark.parametrize(
    ("given", "shown"),
    [(None, "None (is a `return` missing?)"), (torch.zeros(1), "tensor([0.]) (Tensor)"), ((1,), "(1,) (tuple)")],
)
def test_a_prepare_that_gives_no_tensors_is_told_by_the_kernels_name(given, shown):
    kernel = Listed()
    kernel.backend, kernel.prepare = "bad", lambda weights, device: given
    with pytest.raises(BackendError) as caught:
        prepared(kernel, (), CPU)
    wanted = "it must return a tuple of tensors, () for none"
    assert str(caught.value) == f"bad:f32.prepare returned {shown}: {wanted}"


@pytest.mark.parametrize("what", ["inputs", "outputs"])
def test_formats_in_a_flat_list_are_told_how_to_nest(what):
    flat = variation(**{what: lambda self, node: ["f32"]})
    said = f"bad:f32.{what} must give a list of formats for each, as [['f32']], not ['f32']"
    with registry.isolated(bad=listing([flat])) as found, pytest.raises(BackendError) as caught:
        plan_for(silu_graph(), found)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("forgets", "said"),
    [
        (
            "outputs",
            "bad:f32.outputs must give a list of formats for each, as [['f32']], not None (is a `return` missing?)",
        ),
        ("variants", "bad:f32.variants returned None (is a `return` missing?): it must return a list, [] for none"),
    ],
)
def test_a_forgotten_return_is_told_by_plan_and_by_check(forgets, said):
    lost = variation(**{forgets: lambda self, node: None}, takes={})
    with registry.isolated(bad=listing([lost])) as found:
        with pytest.raises(BackendError) as caught:
            plan_for(silu_graph(), found)
        assert said in str(caught.value)
        case = next(case for case in OPS["silu"].cases() if "smoke" in case.marks)
        assert said in run_case(case, "bad:f32", found, "cpu").failures[0]


@pytest.mark.parametrize(
    ("scratch", "shown"),
    [(None, r"None \(is a `return` missing\?\)"), (-4, r"-4 \(int\)"), (1.5, r"1\.5 \(float\)"), (True, "True")],
    ids=repr,
)
def test_scratch_that_is_no_number_of_bytes_is_told_by_plan_and_by_check(scratch, shown):
    said = rf"^bad:f32\.workspace returned {shown}.*: it must return a number of bytes, 0 for none"
    lost = variation(workspace=lambda self, node: scratch, takes={})
    with registry.isolated(bad=listing([lost])) as found:
        with pytest.raises(BackendError, match=said):
            plan_for(silu_graph(), found)
        case = next(case for case in OPS["silu"].cases() if "smoke" in case.marks)
        assert re.search(said.removeprefix("^"), run_case(case, "bad:f32", found, "cpu").failures[0])


def test_work_that_is_forgotten_is_told_by_plan_and_by_check_where_there_are_variants():
    said = "bad:f32.work returned None (is a `return` missing?): it must return a str"
    forgets = {"work": lambda self, node: None, "takes": {}}
    case = next(case for case in OPS["silu"].cases() if "smoke" in case.marks)
    with registry.isolated(bad=listing([variation(variants=lambda self, node: [1, 2], **forgets)])) as found:
        with pytest.raises(BackendError, match=re.escape(said)):
            plan_for(silu_graph(), found)
        assert any(said in failure for failure in run_case(case, "bad:f32", found, "cpu").failures)
    with registry.isolated(good=listing([variation(**forgets)])) as found:
        assert plan_for(silu_graph(), found).schedules


def test_refuses_that_returns_words_is_told_by_name():
    worded = variation(refuses=lambda self, node: "too wide")
    with registry.isolated(bad=listing([worded])) as found:
        found.offer(SILU, CPU)
        fault = found.backends["bad"].fault
    assert "bad:f32.refuses returned 'too wide' (str): it must return Declined(reason) or None" in fault


def test_the_suite_runs_a_kernel_with_its_first_variant():
    seen = []

    def bind(self, node, tensors, stream):
        seen.append(self.variant)
        x, y = tensors.inputs[0][0], tensors.outputs[0][0]
        return lambda: torch.mul(x, torch.sigmoid(x), out=y)

    tiled = variation(variants=lambda self, node: [16, 32], bind=bind, takes={})
    with registry.isolated(a=listing([tiled])) as found:
        case = next(case for case in OPS["silu"].cases() if "smoke" in case.marks)
        outcome = run_case(case, "a:f32", found, "cpu")
    assert outcome.status == "pass", outcome.failures
    assert set(seen) == {16}
