"""A kind of device that core has never heard of: found, planned for, and run on, by one class and a backend."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest

import kernelmux
import kernelmux_reference
from fake_backend import compute
from fake_platform import Npu
from kernelmux.contract import CONTRACT, Declined, Kernel, hookimpl, registry
from kernelmux.contract import device as devices
from kernelmux.contract.device import described_device, find_device
from kernelmux.errors import PlanError
from kernelmux.policy.policy import parse_policy
from kernelmux.run.model import Model
from kernelmux.run.pages import CapacityError
from kernelmux.run.session import Session

PROMPT = [1, 2, 3, 4, 5]
STREAMS = []


class OnNpu(Kernel):
    """Computes on the stream that it was bound to; packs weights into a form of its own name."""

    ops = ("*",)
    precision = 1e-11
    devices = ("npu",)

    def packed_bytes(self, node):
        return sum(4 * value.extents[0] * (value.extents[1:] or (1,))[0] for value in node.weights)

    def prepare(self, weights, device):
        return tuple(weight.dequantize() for weight in weights)

    def bind(self, node, tensors, stream):
        STREAMS.append(stream)
        return lambda: stream.enqueue(lambda: compute(node, tensors))


class One(OnNpu):
    name = packed = "one"


class Two(OnNpu):
    name = packed = "two"


class RaisesAtMul(OnNpu):
    """Raises at its third launch."""

    name = packed = "raises"
    ops = ("mul",)
    calls = []

    def bind(self, node, tensors, stream):
        def launch():
            self.calls.append(node.name)
            if len(self.calls) == 3:
                raise RuntimeError("out of tiles")
            compute(node, tensors)

        return launch


class Backend:
    CONTRACT = CONTRACT

    @hookimpl
    def device_refusal(self, device):
        return None if device.kind == "npu" else Declined("it is for NPUs", "device")

    @hookimpl
    def kernel_classes(self):
        return [RaisesAtMul, One, Two]


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> Npu:
    platform = Npu()
    monkeypatch.setattr(devices, "PLATFORMS", dict(devices.PLATFORMS))
    devices.add_platform(platform)
    STREAMS.clear()
    RaisesAtMul.calls.clear()
    return platform


@pytest.fixture
def model(tiny: Path, npu: Npu):
    with registry.isolated(acme=Backend(), reference=kernelmux_reference):
        yield kernelmux.load(tiny)


def _plan(model: Model, kernel: str, on_error: str = "error"):
    policy = parse_policy(f'fuse = false\n[defaults]\nuse = ["{kernel}"]\non_error = "{on_error}"\n', "p.toml")
    return model.plan(policy, device="npu", max_rows=16)


def _decoded(session: Session, steps: int = 6) -> list[int]:
    sequence = session.open()
    first = int(session.feed(sequence, PROMPT)[-1].argmax())
    return [first, *(ids[0] for ids in session.decode([sequence], [first], steps))]


def test_a_new_kind_of_device_is_found_described_and_listed(npu: Npu):
    found = find_device("npu:1")
    assert (found.kind, found.index, found.torch, found.processors) == ("npu", 1, "cpu", 16)
    assert found.device_class == "npu v2 Test NPU, 16 processors"
    assert described_device(found.device_class).device_class == found.device_class
    with pytest.raises(PlanError, match=r"unknown device 'tpu'; known: .*npu"):
        find_device("tpu")


def test_the_class_of_the_docs_page_describes_and_finds(monkeypatch: pytest.MonkeyPatch):
    page = Path(__file__).parents[3] / "docs" / "adding-a-device.md"
    space: dict[str, Any] = {}
    exec(page.read_text("utf-8").split("```python\n")[1].split("```")[0], space)
    monkeypatch.setattr(devices, "PLATFORMS", dict(devices.PLATFORMS))
    devices.add_platform(space["Npu"]())
    assert described_device("npu v2 Acme 100").device_class == "npu v2 Acme 100"
    with pytest.raises(PlanError, match="no Acme NPU"):
        find_device("npu:1")


def test_an_installed_package_brings_a_kind_of_device(monkeypatch: pytest.MonkeyPatch):
    class Entry:
        name = "npu"

        def load(self):
            return Npu

    monkeypatch.setattr(devices, "PLATFORMS", dict(devices.PLATFORMS))
    monkeypatch.setattr(devices, "entry_points", lambda group: [Entry()] if group == "kernelmux.platforms" else [])
    assert find_device("npu").name == "Test NPU"


def test_a_session_generates_on_it_with_kernels_that_take_that_kind_alone(model: Model):
    on_cpu = model.plan(use=["*=acme:one"]).schedule(1, 1).steps
    assert not any(step.choice.name.startswith("acme") for step in on_cpu)
    assert any(loser.reason == "it is for NPUs" for step in on_cpu for loser in step.choice.rejected)
    on_npu = _plan(model, "acme:one").schedule(1, 1).steps
    assert {step.choice.name for step in on_npu} == {"acme:one"}
    ids = _decoded(model.session(_plan(model, "acme:one"), 64))
    assert ids == _decoded(model.session(model.plan(use=["*=reference:f32"], max_rows=16), 64))


def test_a_session_has_one_stream_whatever_becomes_of_its_plan(model: Model, npu: Npu):
    """Bound again after a kernel has raised, kernels are given the stream that they had before."""
    session = model.session(_plan(model, "acme", on_error="next"), 64)
    ids = _decoded(session)
    assert session.walker.plan.banned == {("blk.0.ffn_mul", "acme:raises")}
    assert npu.streams == [session.walker.stream]
    assert set(STREAMS) == {session.walker.stream}
    assert ids == _decoded(model.session(_plan(model, "acme:two"), 64))


# Memory: what must be packed still, and what is let go.


def _needs(model: Model, kernel: str, npu: Npu) -> int:
    """Bytes that a session needs beside the weights."""
    plan = _plan(model, kernel)
    npu.free = 0
    with pytest.raises(CapacityError) as caught:
        model.session(plan, 64)
    assert "0 B free" in str(caught.value)
    cache = 64 * plan.kv_bytes_per_token
    return max(schedule.layout.nbytes for schedule in plan.schedules.values()) + cache


def test_a_second_policy_on_a_model_fits_only_if_its_own_forms_do(model: Model, npu: Npu):
    one, two = _plan(model, "acme:one"), _plan(model, "acme:two")
    beside = _needs(model, "acme:one", npu)
    npu.free = one.packed_bytes + beside
    first = model.session(one, 64)
    list(first.prepare(()))
    npu.free = beside
    # The same forms again cost nothing; those of another policy have all to be made.
    _decoded(model.session(one, 64))
    with pytest.raises(CapacityError, match="weights need"):
        model.session(two, 64)
    npu.free = two.packed_bytes + beside - 1
    with pytest.raises(CapacityError, match="weights need"):
        model.session(two, 64)
    npu.free = two.packed_bytes + beside
    _decoded(model.session(two, 64))


def test_forms_are_let_go_with_the_last_session_that_packed_them(model: Model, npu: Npu):
    plan = _plan(model, "acme:one")
    sessions = [model.session(plan, 64) for _ in range(2)]
    _decoded(sessions[0])
    step = plan.schedule(1, 1).steps[-1]
    parts = [session.walker.packed.get(step.node, step.choice.name, step.choice.kernel) for session in sessions]
    assert all(ours is theirs for ours, theirs in zip(*parts, strict=True))
    alive = weakref.ref(parts[0][0])
    del parts, sessions[0]
    assert alive() is not None
    sessions.clear()
    assert alive() is None
    npu.free = plan.packed_bytes + _needs(model, "acme:one", npu) - 1
    with pytest.raises(CapacityError, match="weights need"):
        model.session(plan, 64)


def test_forms_that_only_a_kernel_that_raised_has_packed_are_let_go(model: Model):
    session = model.session(_plan(model, "acme", on_error="next"), 64)
    _decoded(session)
    held = session.walker.packed
    assert held.nbytes == session.walker.plan.packed_bytes
