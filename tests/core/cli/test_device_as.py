"""`--device-as`: a plan, and a policy's check, for a card that is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command import assert_one_line_error, call_command
from kernelmux.contract import CONTRACT, Declined, Kernel, hookimpl, registry
from kernelmux.contract.device import Device

H200 = "cuda sm_90 NVIDIA H200"


class OnCuda(Kernel):
    """Is offered on cards of compute capability 9.0 with many processors, and must never be asked to pack or bind."""

    ops = ("*",)
    name = "hopper"
    precision = 1e-11
    devices = ("cuda",)
    capability = (9, 0)

    def refuses(self, node):
        return None if self.device.processors > 100 else Declined("it wants a large card", "device")

    def prepare(self, weights, device):
        raise AssertionError("a plan packs nothing")

    def bind(self, node, tensors, stream):
        raise AssertionError("a plan binds nothing")


class Other(OnCuda):
    name = "any"
    capability = (0, 0)

    def refuses(self, node):
        return None


class Backend:
    CONTRACT = CONTRACT

    @hookimpl
    def kernel_classes(self):
        return [OnCuda, Other]


@pytest.fixture(autouse=True)
def acme():
    with registry.isolated(acme=Backend()):
        yield


def _kernels(tiny: Path, *arguments: str) -> tuple[str, set[str]]:
    result = call_command("plan", tiny, "--use", "*=acme", "--json", *arguments)
    assert result.code == 0, result.err
    document = json.loads(result.out)
    return document["device"], {node["kernel"] for node in document["nodes"]}


@pytest.mark.parametrize(
    ("described", "kernels"),
    [
        (H200, {"acme:hopper"}),
        ("cuda sm_90 NVIDIA H100 80GB HBM3 MIG 1g.10gb, 16 processors", {"acme:any"}),
        ("cuda sm_89 NVIDIA L4, 58 processors", {"acme:any"}),
    ],
)
def test_a_plan_for_a_card_that_is_not_there_is_the_one_that_it_would_get(tiny: Path, described: str, kernels: set):
    assert _kernels(tiny, "--device-as", described) == (described, kernels)


def test_a_card_described_by_its_own_class_gets_equal_choices(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    found = Device("cuda", 0, "NVIDIA L4", (8, 9), memory=24 * 10**9, processors=58)
    monkeypatch.setattr(type(found.platform), "find", lambda platform, index: found)
    there = _kernels(tiny, "--device", "cuda")
    assert _kernels(tiny, "--device-as", there[0]) == there


def test_a_policy_is_checked_for_a_card_that_is_not_there(tiny: Path, tmp_path: Path):
    policy = tmp_path / "p.toml"
    policy.write_text('[defaults]\nuse = ["acme"]\n\n[[require]]\nop = "mul_mat"\nkernel = ["acme:hopper"]\n')
    assert call_command("policy", "check", policy, "--model", tiny, "--device-as", H200).code == 0
    small = call_command("policy", "check", policy, "--model", tiny, "--device-as", "cuda sm_89 NVIDIA L4")
    assert small.code == 1
    assert f"{policy}:4" in small.out


def test_what_describes_no_device_is_one_line(tiny: Path):
    assert_one_line_error(call_command("plan", tiny, "--device-as", "NVIDIA H200"), "unknown device 'NVIDIA H200'")
    assert_one_line_error(call_command("plan", tiny, "--device-as", "cuda H200"), "as in 'cuda sm_90 NVIDIA H200'")


@pytest.mark.parametrize("arch", ["sm_9", "sm_", "sm_9000"])
def test_an_architecture_has_two_digits_or_three(tiny: Path, arch: str):
    found = call_command("plan", tiny, "--device-as", f"cuda {arch}")
    assert_one_line_error(found, f"'cuda {arch}' describes no device", "as in 'cuda sm_90 NVIDIA H200'")
