"""The processor: of which class it is found to be, and what is known of it beside that."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kernelmux.contract.cpu import CLASSES, RATES
from kernelmux.contract.device import Device, described_device, find_device
from kernelmux.errors import PlanError


def _variables(**set_to: str) -> dict[str, str]:
    """The environment with those set, and no other that tells torch which processor to be."""
    told = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
    return {**{name: value for name, value in os.environ.items() if name not in told}, **set_to}


def _rank(arch: str) -> int:
    return ("", *CLASSES).index(arch)


@pytest.fixture(scope="module")
def unlimited() -> str:
    """The class of this machine."""
    return _found_with()


def _found_with(**limit: str) -> str:
    code = "from kernelmux.contract.device import *; print(find_device().device_class)"
    ran = subprocess.run([sys.executable, "-c", code], env=_variables(**limit), capture_output=True, text=True)
    assert ran.stderr == ""
    return ran.stdout.strip().partition(" ")[2]


@pytest.mark.parametrize(
    ("limit", "most"),
    [
        ({"ATEN_CPU_CAPABILITY": "default"}, ""),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, "avx2"),
        ({"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, "avx2"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "avx512"),
        ({"DNNL_MAX_CPU_ISA": "avx512_core_vnni"}, "avx512"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "avx512_bf16"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, "amx"),
    ],
    ids=lambda part: part if isinstance(part, str) else ",".join(part.values()),
)
def test_a_processor_that_torch_is_told_to_be_is_of_no_later_class(limit: dict[str, str], most: str, unlimited: str):
    assert _found_with(**limit) == min(most, unlimited, key=_rank)


def test_the_cpu_is_always_there_with_its_threads_and_memory_which_its_class_does_not_tell():
    found = find_device("cpu")
    assert found.processors == torch.get_num_threads() >= 1
    assert found.memory > 2**28
    assert found.device_class == f"cpu {found.arch}".strip()
    described = described_device(found.device_class)
    assert (described.memory, described.processors, described.features) == (0, 0, found.features)


def test_there_is_one_cpu():
    with pytest.raises(PlanError, match="no device cpu:1: the processor is one device"):
        find_device("cpu:1")


def test_threads_that_are_described_count_for_its_rates_and_not_for_its_class():
    one, many = described_device("cpu avx2"), described_device("cpu avx2, 16 processors")
    assert (many.processors, many.device_class) == (16, one.device_class)
    assert many.platform.ceilings(many).read == 16 * one.platform.ceilings(one).read


def test_each_class_has_the_features_of_those_before_it_and_is_no_slower():
    features, rates = frozenset[str](), RATES[""]
    for arch, own in CLASSES.items():
        device = Device("cpu", arch=arch)
        assert device.features == features | set(own)
        assert all(RATES[arch][format] >= rate for format, rate in rates.items())
        features, rates = device.features, RATES[arch]
