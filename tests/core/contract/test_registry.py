"""The registry: each backend loaded and asked by itself, the broken quarantined and named, the others at work."""

import types

import pytest

from fake_backend import FakeKernel, backend, chain, plan_for, silu_graph, whole_backend
from kernelmux.contract import registry
from kernelmux.contract.hookspecs import CONTRACT, Declined, hookimpl
from kernelmux.contract.registry import ALLOW, Registry
from kernelmux.errors import BackendError

GOOD = """
from kernelmux.contract.hookspecs import Declined, hookimpl
CONTRACT = 1
@hookimpl
def dispatch_add(m):
    return Declined("none today")
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution with one backend: `install("mine", source)`."""

    def installed(name, source, dist=None, version="1.2"):
        dist = dist or f"kernelmux-{name}"
        module = f"module_of_{dist}_{tmp_path.name}".replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[kernelmux.backends]\n{name} = {module}\n")

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(ALLOW, raising=False)
    return installed


def _quarantined(record, fault):
    """The record of a backend that is out, with one line for a person and a traceback for its author."""
    assert fault in record.fault
    assert "\n" not in record.fault
    assert "Traceback" in record.trace
    return True


# Found through entry points.


def test_an_installed_backend_is_found_with_its_version(install):
    install("mine", GOOD)
    found = registry.discover()
    assert found.backends["mine"].version == "1.2"
    assert found.ops("mine") == ("add",)
    assert "mine" in found.working


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("def broken(:", "SyntaxError"),
        ("raise RuntimeError('no driver\\nsecond line')", "RuntimeError: no driver"),
        ("raise SystemExit('no driver')", "SystemExit"),
        (GOOD.replace("CONTRACT = 1", ""), "states no contract version"),
        (GOOD.replace("CONTRACT = 1", "CONTRACT = 2"), f"was built for contract 2, this kernelmux speaks {CONTRACT}"),
        (GOOD.replace("(m)", "(m, rows)"), "rows"),
        (GOOD.replace("dispatch_add", "dispatch_ad"), "dispatch_ad is no hook (did you mean 'dispatch_add'?)"),
        (GOOD.replace("dispatch_add", "add"), "add"),
        (GOOD.replace("@hookimpl\n", ""), "implements no hook: mark its dispatch functions with @hookimpl"),
        (GOOD + "def dispatch_mul(m): pass\n", "dispatch_mul"),
    ],
    ids=[
        *("import", "syntax", "raise", "exit", "no contract", "wrong contract"),
        *("argument", "misspelt", "no prefix", "no marker", "one without marker"),
    ],
)
def test_a_broken_backend_is_quarantined_and_the_others_work(install, source, fault):
    install("broken", source)
    install("mine", GOOD)
    found = registry.discover()
    assert _quarantined(found.backends["broken"], fault)
    assert "broken" not in found.working
    assert "mine" in found.working
    assert found.ask("add", {"m": 1}).declined["mine"] == Declined("none today")


def test_two_distributions_that_bring_one_name_are_not_silently_one(install):
    install("mine", GOOD, dist="kernelmux-one")
    install("mine", GOOD, dist="kernelmux-two")
    try:
        found = registry.discover()
    except BackendError as error:
        message = str(error)
    else:
        message = " ".join(record.fault for record in found.backends.values())
    assert "mine" in message


def test_only_allowed_backends_are_loaded(install, monkeypatch):
    install("mine", GOOD)
    install("other", "raise RuntimeError('must not be imported')")
    monkeypatch.setenv(ALLOW, " mine ")
    assert list(registry.discover().backends) == ["mine"]


def test_an_allowed_backend_that_does_not_exist_is_an_error(install, monkeypatch):
    install("mine", GOOD)
    monkeypatch.setenv(ALLOW, "mien")
    with pytest.raises(BackendError, match=r"KERNELMUX_BACKENDS names 'mien' \(did you mean 'mine'\?\); known: .*mine"):
        registry.discover()


def test_an_allowed_backend_may_be_named_twice(install, monkeypatch):
    install("mine", GOOD)
    monkeypatch.setenv(ALLOW, "mine,mine")
    assert registry.discover().working == ("mine",)


# Asked at plan time.


def _raises(node, m):
    raise RuntimeError("no such card\nsecond line")


ANSWERS = {
    "a number": 3,
    "a text": "fast",
    "a class": FakeKernel,
    "None in a list": [None],
    "a kernel's name in a list": [FakeKernel(), "exact"],
    "two kernels of one name": [FakeKernel("k"), FakeKernel("k")],
}


@pytest.mark.parametrize("answer", [_raises, *ANSWERS.values()], ids=["an exception", *ANSWERS])
def test_a_hook_that_raises_or_answers_nonsense_is_quarantined_and_the_others_answer(answer):
    # A class is an answer, not something to be asked.
    hook = (lambda node, m: answer) if isinstance(answer, type) else answer
    with registry.isolated(bad=backend(silu=hook), good=backend(silu=FakeKernel())) as found:
        step = plan_for(silu_graph(), found).schedule(1, 1).steps[0]
    assert step.choice.name == "good:f32"
    assert found.backends["bad"].fault
    assert _quarantined(found.backends["bad"], found.backends["bad"].fault)
    assert "quarantined" in next(loser.reason for loser in step.choice.rejected if loser.kernel == "bad")
    assert found.working == ("good",)


def test_two_kernels_of_one_name_are_told_by_it():
    with registry.isolated(bad=backend(silu=ANSWERS["two kernels of one name"]), good=whole_backend()) as found:
        plan_for(silu_graph(), found)
    assert _quarantined(found.backends["bad"], "two kernels of this op are named bad:k")


def test_a_backend_that_is_quarantined_while_a_plan_is_made_has_no_kernel_in_it():
    """Else the same graph gives another plan the second time."""
    bad = backend(silu=FakeKernel(), add=_raises)
    with registry.isolated(bad=bad, good=whole_backend()) as found:
        first = plan_for(chain("silu", "add"), found)
        second = plan_for(chain("silu", "add"), found)
    assert {step.choice.name for step in first.schedule(1, 1).steps} == {"good:f32"}
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("answer", [None, []])
def test_an_answer_of_nothing_is_a_refusal(answer):
    with registry.isolated(a=backend(silu=answer), b=backend(silu=FakeKernel())) as found:
        choice = plan_for(silu_graph(), found).schedule(1, 1).steps[0].choice
    assert (choice.name, [loser.kernel for loser in choice.rejected]) == ("b:f32", ["a"])
    assert choice.rejected[0].reason
    assert found.working == ("a", "b")


def test_a_hook_is_told_only_what_it_names():
    told = {}
    plugin = types.SimpleNamespace(CONTRACT=CONTRACT)

    @hookimpl
    def dispatch_silu(n, device):
        told.update(n=n, device=device.kind)
        return FakeKernel()

    plugin.dispatch_silu = dispatch_silu
    with registry.isolated(a=plugin) as found:
        plan_for(silu_graph(columns=24), found)
    assert told == {"n": 24, "device": "cpu"}


def test_kernels_and_refusals_are_filed_under_full_names():
    answer = [FakeKernel("fast"), Declined("too wide", "shape", "small"), FakeKernel("exact")]
    with registry.isolated(a=backend(silu=answer), b=backend(add=FakeKernel())) as found:
        offer = found.ask("silu", {"node": None, "m": 1})
    assert list(offer.kernels) == ["a:fast", "a:exact"]
    assert {name: refusal.kind for name, refusal in offer.declined.items()} == {"a:small": "shape", "b": "not offered"}


# The registry of the process.


def test_isolated_restores_what_was_there_even_after_an_error():
    before = registry.current()

    def fails():
        with registry.isolated(a=whole_backend()) as inner:
            assert registry.current() is inner
            assert inner.working == ("a",)
            raise KeyError("x")

    with pytest.raises(KeyError):
        fails()
    assert registry.current() is before


def test_register_adds_a_backend_as_a_notebook_would():
    with registry.isolated():
        registry.register(whole_backend(), "mine")
        assert plan_for(silu_graph(), registry.current()).schedule(1, 1).steps[0].choice.name == "mine:f32"


def test_register_raises_on_a_broken_backend_and_frees_its_name():
    with registry.isolated():
        with pytest.raises(BackendError, match=r"mine: .*states no contract version"):
            registry.register(types.SimpleNamespace(), "mine")
        assert registry.register(whole_backend(), "mine").fault == ""


def test_a_name_is_given_once():
    found = Registry()
    found.register(whole_backend(), "mine")
    with pytest.raises(BackendError, match="'mine' is registered already"):
        found.register(whole_backend(), "mine")
    assert found.working == ("mine",)


def test_a_modules_own_name_loses_the_projects_prefix():
    plugin = whole_backend()
    plugin.__name__ = "kernelmux_mine"
    assert Registry().register(plugin).name == "mine"
