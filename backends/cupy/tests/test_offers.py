"""What the backend offers for a card, asked on any machine."""

import pytest

import kernelmux_cupy
from kernelmux.conformance.hookup import all_cases
from kernelmux.conformance.testing import one_node
from kernelmux.contract import Declined, registry
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import case_node
from kernelmux_cupy import source

H100 = Device("cuda", 0, "H100", (9, 0))

if refused := source.refusal(H100):
    pytest.skip(refused.reason, allow_module_level=True)


def mul_mat(m, format, k=512):
    node = one_node("mul_mat", Value("x", (m, k)), weight=(Value("w", (96, k), format),))
    answers = kernelmux_cupy.dispatch_mul_mat(node, m, H100)
    return {answer.kernel if isinstance(answer, Declined) else answer.name: answer for answer in answers}


def test_quantised_weights_are_taken_up_to_sixteen_rows():
    assert not isinstance(mul_mat(16, "Q4_K")["dp4a"], Declined)
    refused = mul_mat(17, "Q4_K")["dp4a"]
    assert (refused.kind, refused.reason) == ("shape", "it reads the weights once for up to 16 rows, m is 17")


def test_formats_that_are_not_packed_are_declined():
    assert mul_mat(1, "Q2_K")["dp4a"].kind == "format"
    assert mul_mat(1, "Q2_K")["bf16"].kind == "format"


def test_dense_weights_are_taken_up_to_eight_rows_of_whole_vectors():
    assert not isinstance(mul_mat(8, "bf16")["bf16"], Declined)
    assert mul_mat(9, "bf16")["bf16"].kind == "shape"
    assert mul_mat(1, "bf16", 127)["bf16"].kind == "alignment"


def test_a_group_of_rows_is_a_block_of_q8_32():
    kernel = mul_mat(1, "Q4_K")["dp4a"]
    for n, written in ((96, True), (33, False)):
        node = one_node("mul_mat", Value("x", (1, 512)), weight=(Value("w", (n, 512), "Q4_K"),))
        assert ("q8_32" in kernel.outputs(node)[0]) == written


@pytest.mark.parametrize("capability", [(9, 0), (7, 5), (6, 1), (5, 2)], ids=str)
def test_every_case_of_the_suite_gets_an_answer(capability):
    device = Device("cuda", 0, "card", capability)
    with registry.isolated(cupy=kernelmux_cupy) as alone:
        for case in all_cases():
            node = case_node(case)
            offer = alone.ask(case.op, {"node": node, "device": device, **node.contract.arguments(node)})
            assert not alone.backends["cupy"].fault, f"{case.name}: {alone.backends['cupy'].fault}"
            for kernel in offer.kernels.values():
                assert kernel.packed_bytes(node) >= 0
                assert len(kernel.inputs(node)) == len(node.inputs)
