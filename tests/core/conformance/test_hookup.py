"""Which jobs a backend gets, known failures, and the test class that one line makes."""

import inspect
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from fake_backend import FakeKernel
from kernelmux.conformance import Filter, jobs, suite
from kernelmux.conformance.hookup import all_cases
from kernelmux.conformance.testing import backend
from kernelmux.contract import Declined, hookimpl, registry
from kernelmux.contract.device import Device
from kernelmux.errors import BackendError
from kernelmux.graph.formats import Value
from kernelmux.graph.ops import Case, Fused, Part
from wrong.elementwise import AddsInsteadOfMultiplying, ToBf16
from wrong.kernel import Right, offering


class AddSilu(Fused):
    """y = silu(a + b)."""

    name, inputs, outputs = "add_silu", ("a", "b"), ("y",)
    pattern = (Part("add", ("a", "b"), ("sum",)), Part("silu", ("sum",), ("y",)))

    def cases(self):
        yield Case("add_silu-m1-n16", self.name, (Value("a", (1, 16)), Value("b", (1, 16))))


def plugin():
    """A backend that brings an op."""
    made = backend()
    made.new_ops = hookimpl(lambda: [AddSilu()])
    return made


def names(wanted=None, **answers):
    with registry.isolated(mine=backend(**answers)) as current:
        return [job.name for job in jobs("mine", current, "cpu", wanted)]


@pytest.fixture
def known_file(tmp_path):
    def write(*cases):
        path = tmp_path / "known_failures.toml"
        tables = (f'case = "{case}"\nkernel = "mine:kernel"\nreason = "rounds"\nlink = "l"\n' for case in cases)
        path.write_text("".join(f"[[failure]]\n{table}" for table in tables))
        return path

    return write


def run(plugin, **options):
    """What became of each test of the class that `suite` makes, by name of outcome; the messages of the failed."""
    counts, messages = Counter(), []

    def test(call, *arguments):
        try:
            call(*arguments)
        except pytest.xfail.Exception:  # A failure too, by its class.
            counts["known"] += 1
        except pytest.fail.Exception as error:
            counts["failed"] += 1
            messages.append(str(error))
        except pytest.skip.Exception:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1

    with registry.isolated(mine=plugin):
        try:
            tests = suite("mine", **options)
        except BackendError as error:
            return Counter(failed=1), [str(error)]
        (marker,) = tests.test_case.pytestmark
        for (job,) in (parameter.values for parameter in marker.args[1]):
            test(tests().test_case, job, SimpleNamespace(node=SimpleNamespace(user_properties=[])))
        for name, method in inspect.getmembers(tests(), inspect.ismethod):
            if name.startswith("test_") and name != "test_case":
                test(method)
    return counts, messages


# Jobs.


def test_a_backend_is_asked_for_one_op_where_no_other_is_wanted():
    asked = []

    def answer(node, m):
        asked.append(node.op)
        return FakeKernel()

    assert names(Filter(op="mul"), silu=answer, mul=answer) == [
        name for name in names(silu=answer, mul=FakeKernel()) if name.startswith("mul-")
    ]
    asked.clear()
    names(Filter(op="mul"), silu=answer, mul=answer)
    assert set(asked) == {"mul"}


def test_a_kernel_gets_every_case_of_its_op_that_is_not_large():
    cases = [case.name for case in all_cases() if case.op == "silu" and "large" not in case.marks]
    assert names(Filter(), silu=Right()) == cases


def test_a_kernel_gets_a_variant_for_each_format_that_it_declares():
    found = names(Filter(case="*@*"), add=ToBf16())
    assert found == ["add-m5-n576@outputs0=f32", "add-m5-n576@outputs0=bf16"]


def test_what_several_values_may_have_they_have_together_too():
    found = names(Filter(case="*@*"), add=FakeKernel(takes=["f32", "bf16"], emits=["f16", "bf16"]))
    places = [*(f"{place}={format}" for place in ("inputs0", "inputs1") for format in ("f32", "bf16"))]
    places += ["outputs0=f16", "outputs0=bf16", "all=f32", "all=bf16"]
    assert [name.partition("@")[2] for name in found] == places


def test_variants_are_of_one_row_where_no_other_case_is_taken():
    found = names(Filter(case="*@*"), add=lambda node, m: ToBf16() if m == 1 else Declined("one row"))
    assert found == ["add-m1-n576@outputs0=f32", "add-m1-n576@outputs0=bf16"]


def test_an_op_that_a_plugin_brings_has_its_cases_while_it_is_there():
    before = all_cases()
    with registry.isolated(mine=plugin()):
        assert {case.op for case in all_cases()} - {case.op for case in before} == {"add_silu"}
    assert all_cases() == before


def test_on_a_gpu_the_suite_holds_the_large_cases(monkeypatch):
    home = "kernelmux.conformance.hookup"
    monkeypatch.setattr(f"{home}.find_device", lambda name: Device("cuda", 0, "H100", (9, 0)))
    with registry.isolated(mine=offering(Right, "mul_mat")):
        (marker,) = suite("mine", device="cuda").test_case.pytestmark
    assert any("large" in parameter.values[0].case.marks for parameter in marker.args[1])


def test_case_names_are_unique():
    assert [name for name, count in Counter(case.name for case in all_cases()).items() if count > 1] == []


@pytest.mark.parametrize(
    ("wanted", "holds"),
    [
        (Filter(op="mul"), lambda case: case.op == "mul"),
        (Filter(case="*-m5-*"), lambda case: "-m5-" in case.name),
        (Filter(smoke=True), lambda case: "smoke" in case.marks),
        (Filter(kernel="mine:other"), lambda case: False),
        (Filter(op="silu", smoke=True), lambda case: case.op == "silu" and "smoke" in case.marks),
    ],
)
def test_a_filter_keeps_what_it_names(wanted, holds):
    both = {"mul": Right(), "silu": Right()}
    assert names(wanted, **both) == [case.name for case in all_cases() if case.op in both and holds(case)]


def test_large_cases_run_where_they_are_asked_for():
    large = [case.name for case in all_cases() if case.op == "mul_mat" and "large" in case.marks]
    assert not set(names(Filter(), mul_mat=Right())) & set(large)
    assert set(large) <= set(names(Filter(large=True), mul_mat=Right()))
    assert names(Filter(case=large[0]), mul_mat=Right()) == large[:1]


@pytest.mark.parametrize(
    ("plugin", "asked", "said"),
    [
        (offering(Right, "add"), "mime", "unknown backend 'mime'"),
        (SimpleNamespace(), "mine", "is quarantined"),
        (backend(add=Declined("not today")), "mine", "takes none"),
        (backend(add=[]), "mine", "takes none"),
        (backend(add=lambda node, m: None), "mine", "broke while it was asked: .*is a `return` missing"),
        (backend(add=Declined("not today", kernel="kernel")), "mine", "takes none"),
    ],
    ids=["unknown", "quarantined", "declines", "nothing", "no return", "declines by name"],
)
def test_a_backend_that_takes_nothing_is_an_error(plugin, asked, said):
    with registry.isolated(mine=plugin) as current, pytest.raises(BackendError, match=said):
        list(jobs(asked, current, "cpu", Filter()))


# The class.


def test_a_right_backend_passes():
    counts, messages = run(offering(Right, "mul"))
    assert messages == []
    assert set(counts) == {"passed"}


def test_a_wrong_one_fails_with_what_runs_the_case_again():
    counts, messages = run(offering(AddsInsteadOfMultiplying, "mul"))
    assert counts["failed"] > 20
    assert "error: " in messages[0]
    assert "again: kernelmux check --kernel mine:kernel --case mul-m1-n576" in messages[0]


def test_refused_cases_are_skipped():
    counts, messages = run(backend(mul=lambda node, m: Right() if m == 1 else Declined("one row", kernel="kernel")))
    assert messages == []
    assert counts["skipped"] > counts["passed"] > 1


def test_a_hook_that_raises_fails_whatever_it_answered_before():
    counts, _ = run(backend(mul=lambda node, m: Right() if m < 17 else 1 / 0))
    assert counts["failed"]


def test_known_failures_are_known(known_file):
    counts, messages = run(offering(AddsInsteadOfMultiplying, "mul"), known_failures=known_file("mul-m*"))
    assert counts["known"] > 20
    assert all("mul-m" not in message for message in messages)


@pytest.mark.parametrize("case", ["mul-m1-n576", "mul-m1-n577"], ids=["passes", "no case"])
def test_a_stale_known_failure_fails(known_file, case):
    counts, messages = run(offering(Right, "mul"), known_failures=known_file(case))
    assert counts["failed"] == 1
    assert f"known_failures.toml names {case}" in messages[0]


def test_a_pattern_of_known_failures_may_hold_cases_that_pass(known_file):
    """As for `kernelmux check`: an entry is stale once no case of it fails."""

    class WrongFrom17Rows(Right):
        def answer(self, node, operands):
            return (super().answer(node, operands)[0] * (1 + (node.outputs[0].extents[0] >= 17)),)

    counts, messages = run(offering(WrongFrom17Rows, "mul"), known_failures=known_file("mul-*"))
    assert counts["known"]
    assert messages == []


def test_a_backend_that_takes_nothing_fails():
    for nothing in (Declined("not today"), Declined("not today", kernel="kernel")):
        counts, _ = run(backend(mul=nothing))
        assert counts["failed"], nothing


def test_without_pytest_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(BackendError, match=r"^suite\('reference'\) needs pytest: pip install pytest$"):
        suite("reference")


def test_a_kernel_that_only_declares_is_no_kernel():
    counts, _ = run(backend(mul=FakeKernel()))
    assert counts["failed"] > 20
