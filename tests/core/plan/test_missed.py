"""What a plan leaves on the table: said where there is something to gain, and by how much."""

import tomllib
import types
from importlib import metadata
from pathlib import Path

import pytest

from fake_backend import CPU, FakeKernel, llama_graph, whole_backend
from kernelmux.conformance.testing import backend
from kernelmux.contract import CONTRACT, Declined, Kernel, hookimpl, registry
from kernelmux.contract.device import described_device
from kernelmux.contract.kernel import Efficiency
from kernelmux.graph.graph import Builder
from kernelmux.measure.table import Tables
from kernelmux.measure.times import Known
from kernelmux.plan.missed import missed, serving
from kernelmux.plan.plan import make_plan
from kernelmux.plan.speed import Speeds
from kernelmux.policy.policy import parse_policy

ROOT = Path(__file__).parents[3]
AUTO = '[defaults]\nuse = ["auto"]\n'
A100 = described_device("cuda sm_80 NVIDIA A100")
H100 = described_device("cuda sm_90 NVIDIA H100")
H200 = described_device("cuda sm_90 NVIDIA H200")


def said(graph, policy=AUTO, device=CPU, **backends):
    with registry.isolated(**backends or {"a": whole_backend()}) as found:
        plan = make_plan(graph, parse_policy(policy, "p.toml"), found, device, 8)
        return list(missed(plan, Speeds(plan)))


def matrix(n=4096, k=4096):
    b = Builder("one")
    x = b.leaf("x", ("m", k), role="state")
    return b.build(b.value("mul_mat", "y", x, weight=(b.leaf("w", (n, k)),)))


def matrices(count):
    """So many products, one behind the other: `y0`, `y1` and so on."""
    b = Builder("chain")
    x = b.leaf("x", ("m", 4096), role="state")
    for number in range(count):
        x = b.value("mul_mat", f"y{number}", x, weight=(b.leaf(f"w{number}", (4096, 4096)),))
    return b.build(x)


def test_what_a_larger_error_budget_would_save_is_told_with_the_budget():
    rough = FakeKernel("rough", precision=3.4e-3, reading=0.9)
    told = said(matrix(), a=whole_backend(mul_mat=[FakeKernel("exact", reading=0.3), rough]))
    assert told[0] == "decoding would take 67% less with max_error = 0.004 (a:rough for 1 node)"


@pytest.mark.parametrize(
    ("use", "told"), [('["auto"]', 1), ('["a:rough", "a"]', 1), ('["a:exact"]', 0), ('["a:exact", "auto"]', 0)]
)
def test_a_larger_error_budget_is_told_of_only_where_the_policy_would_then_have_the_kernel(use, told):
    kernels = [FakeKernel("exact", reading=0.3), FakeKernel("rough", precision=3.4e-3, reading=0.9)]
    found = said(matrix(), f"[defaults]\nmax_error = 1e-6\nuse = {use}\n", a=whole_backend(mul_mat=kernels))
    assert sum("with max_error = 0.004 (a:rough for 1 node)" in line for line in found) == told


@pytest.mark.parametrize(("reading", "told"), [(0.3, 1), (0.85, 0)])
def test_what_a_policy_by_hand_costs_is_told_where_that_is_much(reading, told):
    slow, fast = FakeKernel("slow", reading=reading), FakeKernel("fast", reading=0.9)
    found = said(matrix(), '[defaults]\nuse = ["a:slow"]\n', a=whole_backend(mul_mat=[slow, fast]))
    assert len(found) == told
    for line in found:
        assert line == "decoding would take 67% less with a:fast for 1 node, in place of a:slow, which the policy names"


def test_what_a_policy_by_hand_costs_is_told_with_the_kernel_that_most_of_the_nodes_have():
    kernels = [FakeKernel("odd", reading=0.1), FakeKernel("slow", reading=0.3), FakeKernel("fast", reading=0.9)]
    policy = '[[rule]]\nnode = "y0"\nuse = "a:odd"\n\n[defaults]\nuse = ["a:slow"]\n'
    (told,) = said(matrices(3), policy, a=whole_backend(mul_mat=kernels))
    assert told.endswith("with a:fast for 3 nodes, in place of a:slow, which the policy names")


def test_a_card_that_nobody_knows_is_told_as_which_it_counts():
    (told,) = said(matrix(), '[defaults]\nuse = ["a"]\n', described_device("cuda sm_90 NVIDIA H20O"))
    assert told == "nobody has stated what NVIDIA H20O reaches: it counts as H100"


# Times that nobody measured.


@pytest.mark.parametrize("device", [A100, H100, CPU], ids=lambda device: device.name)
def test_where_nothing_was_measured_tuning_is_named_with_what_it_may_gain_at_most(device):
    kernels = whole_backend(mul_mat=FakeKernel(reading=0.5))
    (told,) = said(matrix(2**16), device=device, a=kernels)
    assert told.startswith(
        f"no tuning for {device.name}: times are as kernels declare; `kernelmux tune MODEL` may gain up to "
    )
    assert "2.0 times in decoding" in told


def test_what_is_near_the_ceilings_has_nothing_to_gain():
    (told,) = said(matrix(), a=whole_backend(mul_mat=FakeKernel(reading=1.0)))
    assert told.endswith("`kernelmux tune MODEL` would measure it")


def test_what_was_measured_on_such_a_device_is_not_told_of_and_another_card_is_named(monkeypatch):
    monkeypatch.setattr(
        Tables, "time", lambda self, kernel, node, rows, context: (Known(40.0), "shipped for NVIDIA H200 at 8x8")
    )
    assert said(matrix(), device=H200) == []
    (told,) = said(matrix(), device=H100)
    assert "times are in proportion to those of NVIDIA H200" in told


def test_where_a_part_was_measured_here_it_is_told_what_was_not(monkeypatch):
    def time(self, kernel, node, rows, context):
        return (Known(40.0), "measured here") if node.op == "mul_mat" and rows == 1 else None

    monkeypatch.setattr(Tables, "time", time)
    (told,) = said(matrix(2**16), a=whole_backend(mul_mat=FakeKernel(reading=0.5)))
    assert told.startswith("tuned in part: the times of 100% of prompts are as kernels declare; ")


def test_a_policy_by_hand_is_not_told_to_tune():
    assert said(matrix(), '[defaults]\nuse = ["a"]\n') == []


# Kernels that declined.


class Sixteens(Kernel):
    """Takes outputs in sixteens alone, which it reads at full speed."""

    ops = ("mul_mat",)
    name = "wide"
    precision = 1e-11
    efficiency = Efficiency(reading=1.0, multiplying=1e6)

    def refuses(self, node):
        n = node.weight[0].extents[0]
        return Declined(f"it takes outputs in sixteens, n = {n}", "alignment") if n % 16 else None

    def bind(self, node, tensors, stream):
        raise NotImplementedError


class Slow(Sixteens):
    efficiency = Efficiency(reading=0.1)


class Rough(Sixteens):
    precision = 1.0


class Broken(Sixteens):
    def packed_bytes(self, node):
        raise ZeroDivisionError


def listing(*classes):
    return types.SimpleNamespace(CONTRACT=CONTRACT, kernel_classes=hookimpl(lambda: list(classes)))


def declining(kernel, n=4095, policy=AUTO):
    told = said(matrix(n), policy, slow=whole_backend(mul_mat=FakeKernel(reading=0.5)), fast=listing(kernel))
    return [line for line in told if "declined" in line]


def test_a_faster_kernel_that_declined_for_its_alignment_is_named_with_node_reason_and_gain():
    (told,) = declining(Sixteens)
    assert told.startswith("fast:wide declined y: it takes outputs in sixteens, n = 4095; ")
    assert told.endswith("decoding would take 50% less")


@pytest.mark.parametrize("kernel", [Slow, Rough, Broken])
def test_one_that_is_slower_or_too_rough_or_cannot_tell_is_not(kernel):
    assert declining(kernel) == []


def test_one_is_not_told_of_where_the_policy_names_another_and_is_where_it_is_named_first():
    assert declining(Sixteens, policy='[defaults]\nuse = ["slow"]\n') == []
    assert len(declining(Sixteens, policy='[defaults]\nuse = ["fast", "slow"]\n')) == 1


def test_one_that_took_the_node_has_not_declined():
    assert declining(Sixteens, n=4096) == []


# Backends that are not here.


@pytest.fixture
def extras(monkeypatch):
    lines = [
        "torch>=2",
        'kernelmux-torch; extra == "cpu"',
        'kernelmux-torch; extra == "cuda12"',
        'kernelmux-cupy[cuda12]; extra == "cuda12"',
        "kernelmux-cupy[cuda13]; extra == 'cuda13'",
        'pytest>=8; extra == "dev"',
    ]
    here = {"kernelmux-torch"}

    def distribution(name):
        if name in here:
            return name
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    monkeypatch.setattr(metadata, "distribution", distribution)
    return here


def test_a_backend_that_serves_the_kind_of_device_and_is_not_installed_is_named(extras):
    by_hand = '[defaults]\nuse = ["a"]\n'
    assert serving(A100) == ["kernelmux-torch", "kernelmux-cupy"]
    assert said(matrix(), by_hand, A100) == ["not installed, with kernels for cuda: pip install kernelmux-cupy"]
    assert said(matrix(), 'forbid = "cupy"\n' + by_hand, A100) == []
    assert said(matrix(), by_hand) == []
    extras.add("kernelmux-cupy")
    assert said(matrix(), by_hand, A100) == []


def test_every_backend_of_this_project_is_told_of_for_some_kind_of_device(monkeypatch):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    lines = [f'{name}; extra == "{extra}"' for extra, names in extras.items() for name in names]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    ours = (ROOT / "backends").glob("*/pyproject.toml")
    names = {tomllib.loads(path.read_text("utf-8"))["project"]["name"] for path in ours}
    assert {*serving(CPU), *serving(A100)} == names - {"kernelmux-reference"}
    assert serving(CPU) == ["kernelmux-torch", "kernelmux-numba"]


def test_one_that_is_installed_and_lacks_a_library_says_which():
    def lacking(device):
        return Declined("cupy is not installed: pip install cupy", "missing dependency")

    plugin = backend(add=FakeKernel())
    plugin.device_refusal = hookimpl(lacking)
    told = said(matrix(), '[defaults]\nuse = ["a"]\n', a=whole_backend(), cupy=plugin)
    assert told == ["cupy is not used: cupy is not installed: pip install cupy"]


def test_a_model_whose_every_time_is_known_misses_nothing(monkeypatch):
    monkeypatch.setattr(Tables, "time", lambda self, kernel, node, rows, context: (Known(40.0), "measured here"))
    assert said(llama_graph(2)) == []
