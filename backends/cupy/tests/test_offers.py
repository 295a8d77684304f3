"""What the backend offers for a card, asked on any machine."""

from dataclasses import replace

import pytest

import kernelmux_cupy
from kernelmux.conformance.hookup import all_cases
from kernelmux.conformance.testing import one_node
from kernelmux.contract import Declined, Kernel, registry
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import case_node
from kernelmux.graph.ops import OPS
from kernelmux_cupy import source

H100 = Device("cuda", name="H100", capability=(9, 0))
PLAIN = ("rms_norm", "add_rms_norm", "add", "mul", "silu", "swiglu", "rope", "copy", "embed", "attention")
FUSED = ("mul_mat_add", "qkv", "gate_up_swiglu")

if refused := source.refusal(H100):
    pytest.skip(refused.reason, allow_module_level=True)


def ask(node, device=H100):
    """Each kernel, or its refusal, by its full name."""
    with registry.isolated(cupy=kernelmux_cupy) as current:
        offer = current.offer(node, device)
    assert not current.backends["cupy"].fault
    return {**offer.kernels, **offer.declined}


def node_of(op, name):
    return case_node(next(case for case in OPS[op].cases() if case.name == name))


def product(m, format, n=96, k=512):
    return one_node("mul_mat", Value("x", (m, k)), weight=(Value("w", (n, k), format),))


def mul_mat(kernel, m, format, k=512):
    return ask(product(m, format, k=k))[f"cupy:{kernel}"]


@pytest.mark.parametrize("capability", [(9, 0), (7, 5), (6, 1), (5, 2)], ids=str)
def test_every_case_of_the_suite_gets_an_answer(capability):
    device = Device("cuda", 0, "card", capability)
    with registry.isolated(cupy=kernelmux_cupy) as alone:
        for case in all_cases():
            node = case_node(case)
            offer = alone.offer(node, device)
            assert not alone.backends["cupy"].fault, f"{case.name}: {alone.backends['cupy'].fault}"
            assert any(name.startswith("cupy") for name in (*offer.kernels, *offer.declined)), case.name
            for kernel in offer.kernels.values():
                assert kernel.packed_bytes(node) >= 0
                assert kernel.workspace(node) >= 0
                assert len(kernel.inputs(node)) == len(node.inputs)


@pytest.mark.parametrize("op", [*PLAIN, *FUSED, "mul_mat", "convert"])
@pytest.mark.parametrize(
    ("device", "kind"),
    [(Device("cpu"), "device"), (Device("cuda", name="GTX 980", capability=(5, 2)), "capability")],
    ids=["cpu", "old"],
)
def test_other_devices_are_declined_with_the_reason(op, device, kind):
    node = case_node(next(OPS[op].cases()))
    ((name, answer),) = ask(node, device).items()
    assert isinstance(answer, Declined)
    assert (name, answer.kind) == ("cupy", kind)


def test_quantised_weights_are_taken_up_to_sixteen_rows():
    assert isinstance(mul_mat("dp4a", 16, "Q4_K"), Kernel)
    refused = mul_mat("dp4a", 17, "Q4_K")
    assert (refused.kind, refused.reason) == ("shape", "it takes m ..16, not 17")


@pytest.mark.parametrize("op", FUSED)
def test_fused_products_are_taken_up_to_sixteen_rows_too(op):
    found = {}
    for case in OPS[op].cases():
        node = case_node(case)
        if all(weight.format in ("Q4_0", "Q4_1", "Q8_0") for weight in node.weight):
            found[node.rows] = isinstance(ask(node)["cupy:dp4a"], Kernel)
    assert {taken for m, taken in found.items() if m <= 16} == {True}
    assert {taken for m, taken in found.items() if m > 16} == {False}


def test_formats_that_are_not_packed_are_declined():
    assert mul_mat("dp4a", 1, "Q2_K").kind == "format"
    assert mul_mat("bf16", 1, "Q2_K").kind == "format"


def test_dense_weights_are_taken_up_to_eight_rows_of_whole_vectors():
    assert isinstance(mul_mat("bf16", 8, "bf16"), Kernel)
    assert mul_mat("bf16", 9, "bf16").kind == "shape"
    assert mul_mat("bf16", 1, "bf16", 127).kind == "alignment"


def test_a_group_of_rows_is_a_block_of_q8_32():
    kernel = mul_mat("dp4a", 1, "Q4_K")
    for n, written in ((96, True), (33, False)):
        assert ("q8_32" in kernel.outputs(product(1, "Q4_K", n))[0]) == written


def test_a_conversion_of_another_format_is_declined_by_its_format():
    nodes = [case_node(case) for case in OPS["convert"].cases()]
    asked = [node for node in nodes if "fp8_row" in (node.inputs[0].format, node.outputs[0].format)]
    assert {ask(node)["cupy:f32"].kind for node in asked[:1] + asked[-1:]} == {"format"}


def test_attention_of_many_rows_is_declined():
    few, many = (ask(node_of("attention", f"attention-prefill-{rows}"))["cupy:f32"] for rows in (64, 128))
    assert isinstance(few, Kernel)
    assert isinstance(many, Declined)
    assert many.kind == "shape"
    assert "m ..64, not 128" in many.reason


def test_attention_with_sinks_is_declined():
    assert ask(node_of("attention", "attention-sinks-window"))["cupy:f32"].reason == "it has no sinks"


def test_attention_with_chunks_is_declined():
    assert ask(node_of("attention", "attention-chunked-8"))["cupy:f32"].reason == "it reads no chunks apart"


def test_attention_is_split_by_the_processors_of_the_card():
    node = node_of("attention", "attention-decode-200")
    small = replace(H100, processors=12)
    whole, less = (ask(node, card)["cupy:f32"].workspace(node) for card in (H100, small))
    assert whole > less > 0


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
    longer = replace(node, inputs=(Value("x", (5, 16_512)),), gamma=(Value("gamma", (16_512,)),))
    assert isinstance(ask(longer)["cupy:f32"], Declined)
