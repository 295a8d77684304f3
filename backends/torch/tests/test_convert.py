"""convert: between which formats, on which device, and why not."""

from __future__ import annotations

import pytest

from fake_backend import one_node
from kernelmux.contract.device import Device
from kernelmux.contract.hookspecs import Declined
from kernelmux.graph.formats import Value
from kernelmux_torch import convert

CUDA = Device("cuda", 0, "some card", (9, 0))


@pytest.mark.parametrize("device", [Device("cpu"), CUDA], ids=lambda device: device.kind)
def test_between_two_quantised_formats_it_declines(device):
    answer = convert.offer("q8_32", "fp8_row", device)
    assert isinstance(answer, Declined)
    assert answer.kind == "format"


@pytest.mark.parametrize("device", [Device("cpu"), CUDA], ids=lambda device: device.kind)
@pytest.mark.parametrize("format", ["q8_32", "fp8_tensor", "fp8_row", "fp8_block"])
def test_one_side_may_be_quantised(format, device):
    quantize = convert.offer("bf16", format, device)
    node = one_node("convert", Value("x", (3, 256), "bf16"), format=format)
    assert quantize.name == "quantize"
    assert "bf16" in quantize.inputs(node)[0]
    assert convert.offer(format, "f16", device).name == "dequantize"
    assert not quantize.capturable
