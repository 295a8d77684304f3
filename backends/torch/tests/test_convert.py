"""convert: between which formats, on which device, and why not."""

from __future__ import annotations

import pytest

from kernelmux.conformance.testing import one_node
from kernelmux.contract import registry
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Value

CUDA = Device("cuda", 0, "some card", (9, 0))


def offered(source, target, device):
    node = one_node("convert", Value("x", (3, 256), source), format=target)
    return registry.current().offer(node, device, only="torch")


@pytest.mark.parametrize("device", [Device("cpu"), CUDA], ids=lambda device: device.kind)
def test_between_two_quantised_formats_it_declines(device):
    assert not offered("q8_32", "fp8_row", device).kernels
    assert {answer.kind for answer in offered("q8_32", "fp8_row", device).declined.values()} == {"format"}


@pytest.mark.parametrize("device", [Device("cpu"), CUDA], ids=lambda device: device.kind)
@pytest.mark.parametrize("format", ["q8_32", "fp8_tensor", "fp8_row", "fp8_block"])
def test_one_side_may_be_quantised(format, device):
    (quantize,) = offered("bf16", format, device).kernels.values()
    node = one_node("convert", Value("x", (3, 256), "bf16"), format=format)
    assert quantize.name == "quantize"
    assert "bf16" in quantize.inputs(node)[0]
    assert list(offered(format, "f16", device).kernels) == ["torch:dequantize"]
    assert not quantize.capturable
