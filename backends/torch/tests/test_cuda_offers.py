"""What the torch backend offers for CUDA, asked on any machine."""

import pytest

from fake_backend import one_node
from kernelmux.conformance.hookup import all_cases
from kernelmux.contract import registry
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import case_node

H100 = Device("cuda", name="H100", capability=(9, 0))
NODES = {
    "gate_up_swiglu": ((Value("x", ("m", 64)),), {"weight": (Value("gate", (96, 64)), Value("up", (96, 64)))}),
    "embed": ((Value("ids", ("m",), "i32"),), {"weight": (Value("table", (50, 64)),)}),
}


def ask(op):
    inputs, fields = NODES[op]
    node = one_node(op, *inputs, **fields).resolve({"m": 4})
    return registry.current().ask(op, {"node": node, "device": H100, **node.contract.arguments(node)})


def test_without_kernelmux_triton_the_backend_says_what_is_missing(monkeypatch):
    monkeypatch.setattr("kernelmux_torch.cuda.find_spec", lambda name: None)
    refused = ask("gate_up_swiglu").declined["torch"]
    assert (refused.kind, "kernelmux-triton is not installed" in refused.reason) == ("missing dependency", True)
    assert "torch:bf16" in ask("embed").kernels


def test_a_tied_head_shares_the_table_of_embed():
    pytest.importorskip("triton")
    head = one_node("mul_mat", Value("x", ("m", 64)), weight=(Value("table", (50, 64)),)).resolve({"m": 4})
    arguments = {"node": head, "device": H100, **head.contract.arguments(head)}
    offered = registry.current().ask("mul_mat", arguments).kernels
    tables = {name: kernel for name, kernel in ask("embed").kernels.items() if name.startswith("torch:")}
    assert {name: offered[name].packed for name in tables} == {name: table.packed for name, table in tables.items()}


@pytest.mark.parametrize("device", [H100, Device("cuda", name="A100", capability=(8, 0))], ids=lambda d: d.name)
def test_every_case_of_the_suite_gets_an_answer(device):
    pytest.importorskip("triton")
    current = registry.current()
    for case in all_cases():
        node = case_node(case)
        offer = current.ask(case.op, {"node": node, "device": device, **node.contract.arguments(node)})
        assert not current.backends["torch"].fault, f"{case.name}: {current.backends['torch'].fault}"
        assert any(name.startswith("torch") for name in (*offer.kernels, *offer.declined)), case.name
