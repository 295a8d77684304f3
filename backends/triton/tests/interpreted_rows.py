"""Norms, elementwise ops and embed, interpreted on CPU tensors: run by test_interpreted.py."""

import pytest
import torch

from fake_backend import backend, nmse, one_node
from kernelmux.formats import Value, dequantize_planes
from kernelmux.hookspecs import Tensors
from kernelmux_triton import elementwise, embed, norm
from triton_interpreter import interpreted_jobs

REGISTRY, CASES = interpreted_jobs(
    backend(
        rms_norm=norm.RmsNorm(),
        add_rms_norm=norm.AddRmsNorm(),
        silu=elementwise.Silu(),
        swiglu=elementwise.Swiglu(),
        embed=lambda node, m: embed.offer(bool(node.weight)),
    )
)


# numpy, which the interpreter computes with, warns of the infinity that silu of far negative numbers divides by.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("job", CASES, ids=[f"{job.kernel}-{job.name}" for job in CASES])
def test_case(job):
    outcome = job.run(REGISTRY)
    if outcome.status == "refused":
        pytest.skip(outcome.reason)
    assert outcome.passed, outcome.failures


@pytest.mark.parametrize("scaled", [False, True], ids=["f32", "fp8_row"])
def test_norms_of_rows_too_long_for_registers(scaled):
    """Written over an input, with a row of zeros and one whose scale is far from the others'."""
    k = norm.LONGEST + 40
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, k, generator=generator) * torch.tensor([[1.0], [0.0], [1e-4]]) for _ in "ab")
    gamma = torch.randn(k, generator=generator)
    values = Value("a", (3, k)), Value("b", (3, k))
    node = one_node("add_rms_norm", *values, gamma=(Value("gamma", (k,)),), epsilon=1e-6)
    total = a + b
    wanted = torch.nn.functional.rms_norm(total, (k,), gamma, 1e-6)
    y = (torch.empty(3, k, dtype=torch.float8_e4m3fn), torch.empty(3, 1)) if scaled else torch.empty(3, k)
    norm.AddRmsNorm().bind(node, Tensors((a, b), (a, y), (gamma,)), None)()
    assert torch.equal(a, total)
    found = dequantize_planes("fp8_row", y) if scaled else y
    assert nmse(found, wanted) < (2e-3 if scaled else 1e-11)
