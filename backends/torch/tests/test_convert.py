"""convert: between which formats, on which device, and why not (its Triton kernels: interpreted_convert.py)."""

from __future__ import annotations

import pytest

from fake_backend import one_node
from kernelmux.device import Device
from kernelmux.formats import Value
from kernelmux.hookspecs import Declined
from kernelmux_torch import convert

CUDA = Device("cuda", 0, "some card", (9, 0))


def test_without_triton_the_reason_is_that(monkeypatch):
    monkeypatch.setattr("kernelmux_torch.cuda.find_spec", lambda name: None)
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
