"""convert on CUDA, without a GPU: its Triton kernels, interpreted, keep the contract and store what core would."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fake_backend import one_node
from kernelmux.device import Device
from kernelmux.formats import Value
from kernelmux.hookspecs import Declined
from kernelmux_torch import convert

CUDA = Device("cuda", 0, "some card", (9, 0))


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernels_keep_the_contract_when_interpreted():
    # Triton reads the variable when it is imported, so that this takes a process of its own.
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            Path(__file__).parent / "interpreted_convert.py",
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr


def test_without_triton_the_reason_is_that(monkeypatch):
    monkeypatch.setattr(convert, "find_spec", lambda name: None)
    answer = convert.offer("f32", "fp8_row", CUDA)
    assert isinstance(answer, Declined)
    assert answer.kind == "missing dependency"
    assert not isinstance(convert.offer("f32", "bf16", CUDA), Declined)


@pytest.mark.parametrize("device", [Device("cpu"), CUDA], ids=lambda device: device.kind)
def test_between_two_quantised_formats_it_declines(device):
    answer = convert.offer("q8_32", "fp8_row", device)
    assert isinstance(answer, Declined)
    assert answer.kind == "format"


@pytest.mark.parametrize("format", ["q8_32", "fp8_tensor", "fp8_row", "fp8_block"])
def test_on_the_cpu_one_side_may_be_quantised(format):
    quantize = convert.offer("bf16", format, Device("cpu"))
    node = one_node("convert", Value("x", (3, 256), "bf16"), format=format)
    assert quantize.name == "quantize"
    assert "bf16" in quantize.inputs(node)[0]
    assert convert.offer(format, "f16", Device("cpu")).name == "dequantize"
