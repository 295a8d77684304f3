"""The registry: each backend loaded and asked by itself, the broken quarantined and named, the others at work."""

import re
import types

import pytest

from fake_backend import CPU, FakeKernel, chain, plan_for, silu_graph, whole_backend
from kernelmux.conformance.testing import backend, one_node
from kernelmux.contract import CONTRACT, Declined, Kernel, hookimpl, registry
from kernelmux.contract.installed import ALLOW
from kernelmux.contract.packed import packed_key
from kernelmux.contract.registry import Registry
from kernelmux.errors import BackendError
from kernelmux.graph.formats import Value
from kernelmux.graph.ops import OPS

ADD = one_node("add", Value("a", (1, 8)), Value("b", (1, 8)))

GOOD = """
from kernelmux.contract import Declined, hookimpl
CONTRACT = 2
@hookimpl
def dispatch_add(m):
    return Declined("none today")
"""

CLASSES = """
from kernelmux.contract import Kernel, hookimpl
CONTRACT = 2
class Add(Kernel):
    ops, name, precision = ("add",), "f32", 1e-9
    def bind(self, node, tensors, stream): pass
class Odd(Add):
    name = "odd"
@hookimpl
def kernel_classes():
    return [Add, Odd]
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


def test_one_of_kernel_classes_has_their_ops_and_no_version_but_its_sources(install):
    install("mine", CLASSES)
    found = registry.discover()
    assert found.ops("mine") == ("add",)
    offer = found.offer(ADD, CPU, "mine")
    assert list(offer.kernels) == ["mine:f32", "mine:odd"]
    assert {kernel.own_version for kernel in offer.kernels.values()} == {found.classes("mine")[0]().own_version}


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("def broken(:", "SyntaxError"),
        ("raise RuntimeError('no driver\\nsecond line')", "RuntimeError: no driver"),
        ("raise SystemExit('no driver')", "SystemExit"),
        ("raise BaseException('no\x1b driver')", "BaseException: no\\x1b driver"),
        (GOOD.replace("CONTRACT = 2", ""), "states no contract version"),
        (GOOD.replace("CONTRACT = 2", "CONTRACT = 1"), f"was built for contract 1, this kernelmux speaks {CONTRACT}"),
        (GOOD.replace("(m)", "(m, rows)"), "rows"),
        (GOOD.replace("dispatch_add", "dispatch_ad"), "dispatch_ad is no hook (did you mean 'dispatch_add'?)"),
        (GOOD.replace("dispatch_add", "add"), "add"),
        (GOOD.replace("@hookimpl\n", ""), "implements no hook: mark kernel_classes, or dispatch_<op>, with @hookimpl"),
        (GOOD + "def dispatch_mul(m): pass\n", "dispatch_mul is not marked: put @hookimpl over it"),
        (GOOD.replace("dispatch_add(m)", "kernel_class()"), "kernel_class is no hook (did you mean 'kernel_classes'?)"),
    ],
    ids=[
        *("import", "syntax", "raise", "exit", "base exception", "no contract", "wrong contract"),
        *("argument", "misspelt", "no prefix", "no marker", "one without marker", "misspelt list"),
    ],
)
def test_a_broken_backend_is_quarantined_and_the_others_work(install, source, fault):
    install("broken", source)
    install("mine", GOOD)
    found = registry.discover()
    assert _quarantined(found.backends["broken"], fault)
    assert "broken" not in found.working
    assert "mine" in found.working
    assert found.offer(ADD, CPU).declined["mine"] == Declined("none today")


def test_of_two_distributions_that_bring_one_name_neither_is_loaded_until_one_is_chosen(install, monkeypatch):
    install("mine", GOOD, dist="kernelmux-one")
    install("mine", CLASSES, dist="kernelmux-two", version="3.4")
    found = registry.discover()
    assert "mine" not in found.working
    fault = found.backends["mine"].fault
    assert "kernelmux-one and kernelmux-two each bring a backend 'mine'" in fault
    monkeypatch.setenv(ALLOW, re.search(rf"{ALLOW}=(\S+)", fault)[1])
    assert registry.discover().backends["mine"].version == "1.2"
    assert "reference" in registry.current().backends
    monkeypatch.setenv(ALLOW, "mine@kernelmux-two")
    assert registry.discover().backends["mine"].version == "3.4"
    monkeypatch.setenv(ALLOW, "mine@kernelmux-tow")
    with pytest.raises(BackendError, match=r"'kernelmux-tow' for 'mine' \(did you mean 'kernelmux-two'\?\)"):
        registry.discover()


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


def _forgets(node, m):
    FakeKernel()


WANTED = "it must answer with MyKernel() or Declined"
ANSWERS = {
    "an exception": (_raises, "RuntimeError: no such card second line (test_registry.py:"),
    "a number": (3, f"bad.dispatch_silu answered with 3 (int): {WANTED}"),
    "a text": ("fast", f"bad.dispatch_silu answered with 'fast' (str): {WANTED}"),
    # A class is an answer, not something to be asked.
    "a class": (lambda node, m: FakeKernel, f"bad.dispatch_silu answered with the class FakeKernel: {WANTED}"),
    "nothing": (_forgets, f"bad.dispatch_silu answered with None (is a `return` missing?): {WANTED}"),
    "None in a list": ([None], f"bad.dispatch_silu answered with None (is a `return` missing?): {WANTED}"),
    "a kernel's name in a list": ([FakeKernel(), "exact"], f"bad.dispatch_silu answered with 'exact' (str): {WANTED}"),
    "two kernels of one name": ([FakeKernel("k"), FakeKernel("k")], "two kernels of this op are named bad:k"),
}


@pytest.mark.parametrize(("answer", "fault"), ANSWERS.values(), ids=ANSWERS)
def test_a_hook_that_raises_or_answers_nonsense_is_quarantined_and_the_others_answer(answer, fault):
    with registry.isolated(bad=backend(silu=answer), good=backend(silu=FakeKernel())) as found:
        step = plan_for(silu_graph(), found).schedule(1, 1).steps[0]
    assert step.choice.name == "good:f32"
    assert _quarantined(found.backends["bad"], fault)
    assert "quarantined" in next(loser.reason for loser in step.choice.rejected if loser.kernel == "bad")
    assert found.working == ("good",)


def test_a_backend_that_is_quarantined_while_a_plan_is_made_has_no_kernel_in_it():
    """Else the same graph gives another plan the second time."""
    bad = backend(silu=FakeKernel(), add=_raises)
    with registry.isolated(bad=bad, good=whole_backend()) as found:
        first = plan_for(chain("silu", "add"), found)
        second = plan_for(chain("silu", "add"), found)
    assert {step.choice.name for step in first.schedule(1, 1).steps} == {"good:f32"}
    assert first.fingerprint == second.fingerprint


def test_an_answer_of_nothing_is_a_refusal():
    with registry.isolated(a=backend(silu=[]), b=backend(silu=FakeKernel())) as found:
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
        offer = found.offer(one_node("silu", Value("x", (1, 8))), CPU)
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


def test_register_names_the_rule_of_names_where_a_policy_could_not_spell_it():
    with registry.isolated():
        for name, said in NAMES.items():
            with pytest.raises(BackendError, match=re.escape(said)):
                registry.register(whole_backend(), name)
        assert registry.current().backends == {}


NAMES = {
    "AcmeKernels": "cannot be named 'AcmeKernels', which no policy can spell",
    "3fast": "cannot be named '3fast', which no policy can spell",
    "n:b": "a lower-case letter comes first, then such letters, digits, _ and -, as 'n-b'",
    "a b\x1b[31m": r"'a b\x1b[31m'",
    "auto": "cannot be named 'auto': a policy says it in place of a name",
    "parts": "cannot be named 'parts'",
}


@pytest.mark.parametrize("name", ["AcmeKernels", "3fast"])
def test_an_installed_backend_of_such_a_name_is_quarantined_and_the_others_work(install, name):
    install(name, GOOD)
    install("mine", GOOD)
    found = registry.discover()
    assert f"cannot be named {name!r}" in found.backends[name].fault
    assert "mine" in found.working


@pytest.mark.parametrize("name", ["a:b", "a b", "", 3])
def test_a_kernel_whose_name_no_policy_can_spell_is_refused(name):
    odd = type("Odd", (Kernel,), {"ops": ("silu",), "name": name, "precision": 0, "bind": lambda *_: None})
    listed = types.SimpleNamespace(CONTRACT=CONTRACT, kernel_classes=hookimpl(lambda: [odd]))
    with registry.isolated(mine=listed) as found:
        found.offer(one_node("silu", Value("x", (1, 8))), CPU)
    assert "must be a name without its backend" in found.backends["mine"].fault


class Gone(BaseException):
    """What is no Exception, as a library may raise to get past everybody."""


@pytest.mark.parametrize("error", [SystemExit(0), Gone("boo"), GeneratorExit()], ids=lambda error: type(error).__name__)
def test_whatever_a_hook_raises_is_contained_and_named(error):
    def raises(*_):
        raise error

    listed = types.SimpleNamespace(CONTRACT=CONTRACT, kernel_classes=hookimpl(lambda: raises()))
    with registry.isolated(bad=backend(silu=raises), listed=listed, good=backend(silu=FakeKernel())) as found:
        assert list(found.offer(one_node("silu", Value("x", (1, 8))), CPU).kernels) == ["good:f32"]
        assert _quarantined(found.backends["bad"], type(error).__name__)
        assert _quarantined(found.backends["listed"], type(error).__name__)


def test_ctrl_c_in_a_hook_is_the_users():
    def interrupted(node, m):
        raise KeyboardInterrupt

    with registry.isolated(mine=backend(silu=interrupted)) as found, pytest.raises(KeyboardInterrupt):
        found.offer(one_node("silu", Value("x", (1, 8))), CPU)


# In place of one another, and gone.


def test_a_backend_takes_anothers_place_as_a_notebooks_cell_that_runs_again():
    with registry.isolated() as found:
        registry.replace(backend(silu=FakeKernel("one")), "mine")
        registry.replace(backend(silu=FakeKernel("two")), "mine")
        assert list(found.offer(one_node("silu", Value("x", (1, 8))), CPU).kernels) == ["mine:two"]
        with pytest.raises(BackendError, match="states no contract version"):
            registry.replace(types.SimpleNamespace(), "mine")
        assert list(found.offer(one_node("silu", Value("x", (1, 8))), CPU).kernels) == ["mine:two"]


def test_what_a_replaced_kernel_packed_is_not_taken_for_its_successors():
    node = one_node("mul_mat", Value("x", (1, 32)), weight=(Value("w", (32, 32)),))
    with registry.isolated():
        keys = []
        for _ in range(2):
            registry.replace(backend(mul_mat=FakeKernel()), "mine")
            kernel = registry.current().offer(node, CPU).kernels["mine:f32"]
            keys.append(packed_key(node, "mine:f32", kernel))
    assert keys[0] != keys[1]


def test_a_backend_that_is_unregistered_takes_its_ops_along_and_leaves_the_others_theirs():
    def brings(*names):
        made = [type("Brought", (type(OPS["silu"]),), {"name": name})() for name in names]
        return types.SimpleNamespace(
            CONTRACT=CONTRACT, new_ops=hookimpl(lambda: made), kernel_classes=hookimpl(lambda: [])
        )

    with registry.isolated(one=brings("alone"), two=brings("both")) as found:
        assert {"alone", "both"} <= set(OPS)
        registry.unregister("one")
        assert "alone" not in OPS
        assert "both" in OPS
        assert found.working == ("two",)
        with pytest.raises(BackendError, match=r"no backend 'one' is registered; known: two"):
            registry.unregister("one")
