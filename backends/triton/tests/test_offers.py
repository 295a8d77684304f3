"""What the Triton backend offers and declines, asked on any machine."""

import subprocess
import sys

import pytest

import kernelmux_triton
from kernelmux.conformance.testing import one_node
from kernelmux.contract import registry
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Value

H100 = Device("cuda", 0, "NVIDIA H100", (9, 0))
A100 = Device("cuda", 0, "NVIDIA A100", (8, 0))


def converting(source, target, device):
    node = one_node("convert", Value("x", (4, 256), source), format=target)
    return registry.current().offer(node, device, only="triton")


def test_the_cpu_and_old_cards_are_refused_before_triton_is_loaded():
    old = Device("cuda", 0, "NVIDIA T4", (7, 5))
    for device, kind in ((Device("cpu"), "device"), (old, "capability")):
        assert kernelmux_triton.device_refusal(device).kind == kind
    code = "import sys; from kernelmux.contract import registry, Device; registry.current().device_refusal('triton', "
    code += "Device('cpu')); assert not {'torch', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_convert_lacks_is_told_by_name():
    pytest.importorskip("triton")
    refused = converting("f32", "fp8_128x128", H100).declined
    # The others do not read f32.
    assert {name for name, why in refused.items() if "not fp8_128x128" in why.reason} == {
        "triton:f32",
        "triton:quantize",
    }
    assert {why.kind for why in refused.values()} == {"format"}
    assert converting("f32", "fp8_row", A100).declined["triton:quantize"].kind == "capability"
    assert list(converting("f32", "q8_32", A100).kernels) == ["triton:quantize"]


@pytest.mark.parametrize(
    ("columns", "formats"),
    [
        (33, {"fp8_row"}),
        (96, {"fp8_row", "q8_32"}),
        (256, {"fp8_row", "q8_32", "fp8_block"}),
        (40_000 - 64, {"q8_32", "fp8_block"}),
    ],
)
def test_swiglu_writes_formats_whose_blocks_fit_the_row(columns, formats):
    pytest.importorskip("triton")
    from kernelmux_triton.elementwise import Swiglu

    node = one_node("swiglu", Value("gate", ("m", columns)), Value("up", ("m", columns)))
    assert set(Swiglu().outputs(node)[0]) == {"f32", "bf16", "f16", *formats}
