"""Norms, elementwise ops and embed, interpreted on CPU tensors."""

from dataclasses import replace

import pytest
import torch

from kernelmux.conformance.testing import backend, nmse, one_node, pass_or_skip
from kernelmux.contract import Tensors
from kernelmux.graph.formats import Value, as_planes, dequantize_planes, empty_planes, lookup
from kernelmux_triton import norm
from offered import offered_on
from triton_interpreter import interpreted_jobs

OPS = ("rms_norm", "add_rms_norm", "add", "mul", "scale", "silu", "gelu", "soft_cap", "swiglu", "qk_norm", "embed")
OPS += ("clamped_swiglu", "temper")

REGISTRY, CASES = interpreted_jobs(backend(**dict.fromkeys(OPS, offered_on())))


# numpy, which the interpreter computes with, warns of the infinity that activations of far numbers divide by.
@pytest.mark.filterwarnings("ignore:overflow encountered in (exp|multiply)")
@pytest.mark.parametrize("job", CASES, ids=[f"{job.kernel}-{job.name}" for job in CASES])
def test_case(job):
    pass_or_skip(job, REGISTRY)


@pytest.mark.parametrize("format", ["f32", "fp8_row", "fp8_block", "q8_32"])
def test_norms_of_rows_too_long_for_registers(format):
    """Written over an input, with a row of zeros and one whose scale is far from the others'."""
    k = norm.LONGEST + 128
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, k, generator=generator) * torch.tensor([[1.0], [0.0], [1e-4]]) for _ in "ab")
    gamma = torch.randn(k, generator=generator)
    values = Value("a", (3, k)), Value("b", (3, k))
    node = one_node("add_rms_norm", *values, gamma=(Value("gamma", (k,)),), epsilon=1e-6)
    node = replace(node, outputs=(node.outputs[0], replace(node.outputs[1], format=format)))
    total = a + b
    wanted = torch.nn.functional.rms_norm(total, (k,), gamma, 1e-6)
    y = empty_planes(node.outputs[1])
    norm.AddRmsNorm().bind(node, Tensors((a, b), (a, as_planes(y)), (gamma,)), None)()
    assert torch.equal(a, total)
    assert nmse(dequantize_planes(format, y), wanted) < max(1e-11, lookup(format).rounding)
    if format == "q8_32":
        assert torch.allclose(y[2], dequantize_planes(format, y).view(3, -1, 32).sum(dim=-1), atol=1e-5)
