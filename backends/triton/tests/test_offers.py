"""What the Triton backend offers and declines, asked on any machine."""

import pytest

import kernelmux_triton
from kernelmux.conformance.testing import one_node
from kernelmux.contract import Declined
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Value

H100 = Device("cuda", 0, "NVIDIA H100", (9, 0))
A100 = Device("cuda", 0, "NVIDIA A100", (8, 0))


def test_the_cpu_and_old_cards_are_refused_before_triton_is_loaded():
    old = Device("cuda", 0, "NVIDIA T4", (7, 5))
    for device, kind in ((Device("cpu"), "device"), (old, "capability")):
        answers = [kernelmux_triton.dispatch_add(device), kernelmux_triton.dispatch_convert("f32", "q8_32", device)]
        assert {answer.kind for answer in answers} == {kind}


def test_what_convert_lacks_is_told_by_name():
    pytest.importorskip("triton")
    from kernelmux_triton import convert

    refused = convert.offer("f32", "fp8_128x128", H100)
    assert isinstance(refused, Declined)
    assert "not fp8_128x128" in refused.reason
    assert convert.offer("f32", "fp8_row", A100).kind == "capability"
    assert convert.offer("f32", "q8_32", A100).name == "quantize"


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
