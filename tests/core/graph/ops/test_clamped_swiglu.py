"""clamped_swiglu: against the definition by the sigmoid, at its limits, and far from them."""

import torch

from kernelmux.conformance.testing import one_node
from kernelmux.graph.formats import Value
from kernelmux.graph.ops import Operands


def _clamped(gate, up, limit=7.0, alpha=1.702):
    node = one_node("clamped_swiglu", Value("gate", gate.shape), Value("up", up.shape), limit=limit, alpha=alpha)
    (y,) = node.contract.reference(node, Operands((gate, up)))
    return y


def test_the_reference_agrees_with_torch():
    gate, up = 5 * torch.randn(2, 4, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low = gate.clamp(max=2.0)
    torch.testing.assert_close(_clamped(gate, up, 2.0, 1.5), (up.clamp(-2, 2) + 1) * low * torch.sigmoid(1.5 * low))


def test_gates_have_no_lower_limit_and_ups_have_two():
    far = torch.tensor([[-3e38, -750.0, -8.0, 8.0, 3e38]])
    one = torch.ones_like(far)
    gates = _clamped(far, 0 * one)
    assert (gates[:, :2] == 0).all()
    assert gates[0, 2] < 0
    assert torch.equal(gates[:, 3:], _clamped(7 * one, 0 * one)[:, 3:])
    ups = _clamped(one, far) / _clamped(one, 0 * one)
    torch.testing.assert_close(ups, torch.tensor([[-6.0, -6.0, -6.0, 8.0, 8.0]]))
