"""What the CuPy backend offers of the plain ops, asked on any machine."""

import pytest

from kernelmux.conformance.hookup import all_cases
from kernelmux.contract import registry
from kernelmux.contract.device import Device
from kernelmux.contract.hookspecs import Declined, Kernel
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import case_node
from kernelmux.graph.ops import OPS

pytest.importorskip("cupy")

import kernelmux_cupy

H100 = Device("cuda", name="H100", capability=(9, 0))
PLAIN = ("rms_norm", "add_rms_norm", "add", "mul", "silu", "swiglu", "rope", "copy", "embed", "attention")


def ask(node, device=H100):
    with registry.isolated(cupy=kernelmux_cupy) as current:
        offer = current.ask(node.op, {"node": node, "device": device, **node.contract.arguments(node)})
    assert not current.backends["cupy"].fault
    return {**offer.kernels, **offer.declined}


def node_of(op, name):
    return case_node(next(case for case in OPS[op].cases() if case.name == name))


@pytest.mark.parametrize("device", [H100, Device("cuda", name="P40", capability=(6, 1))], ids=lambda d: d.name)
def test_every_case_of_the_plain_ops_gets_an_answer(device):
    cases = [case for case in all_cases() if case.op in PLAIN]
    with registry.isolated(cupy=kernelmux_cupy) as current:
        for case in cases:
            node = case_node(case)
            offer = current.ask(case.op, {"node": node, "device": device, **node.contract.arguments(node)})
            assert not current.backends["cupy"].fault, f"{case.name}: {current.backends['cupy'].fault}"
            assert any(name.startswith("cupy") for name in (*offer.kernels, *offer.declined)), case.name


@pytest.mark.parametrize("op", PLAIN)
@pytest.mark.parametrize(
    ("device", "kind"),
    [(Device("cpu"), "device"), (Device("cuda", name="GTX 980", capability=(5, 2)), "capability")],
    ids=["cpu", "old"],
)
def test_other_devices_are_declined_with_the_reason(op, device, kind):
    node = case_node(next(OPS[op].cases()))
    (answer,) = ask(node, device).values()
    assert isinstance(answer, Declined)
    assert answer.kind == kind


def test_attention_of_many_rows_is_declined():
    few, many = (ask(node_of("attention", f"attention-prefill-{rows}"))["cupy:f32"] for rows in (64, 128))
    assert isinstance(few, Kernel)
    assert isinstance(many, Declined)
    assert many.kind == "shape"
    assert "64 rows, not 128" in many.reason


def test_a_table_in_fp8_is_declined():
    answer = ask(node_of("embed", "embed-fp8_row-m1-k512"))["cupy:f32"]
    assert isinstance(answer, Declined)
    assert answer.kind == "format"


@pytest.mark.parametrize(("op", "columns", "quantises"), [("rms_norm", 576, True), ("rms_norm", 127, False)])
def test_whole_blocks_can_be_written_quantised(op, columns, quantises):
    node = node_of(op, f"{op}-m1-k{columns}")
    (written,) = ask(node)["cupy:f32"].outputs(node)
    assert ("q8_32" in written) is quantises


def test_rows_longer_than_a_block_holds_are_declined():
    node = node_of("rms_norm", "rms_norm-m5-k14336")
    assert isinstance(ask(node)["cupy:f32"], Kernel)
    longer = type(node)(**{**vars(node), "inputs": (Value("x", (5, 16_512)),), "gamma": (Value("gamma", (16_512,)),)})
    assert isinstance(ask(longer)["cupy:f32"], Declined)
