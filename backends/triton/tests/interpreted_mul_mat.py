"""The kernels of mul_mat and its fused relatives, interpreted on CPU tensors: run by test_interpreted.py."""

from fnmatch import fnmatchcase

import pytest

from fake_backend import backend
from kernelmux.device import Device
from kernelmux.graph import case_node
from kernelmux_triton import mul_mat
from triton_interpreter import interpreted_jobs

H100 = Device("cuda", 0, "NVIDIA H100 80GB HBM3", (9, 0))


def offered(node, m):
    return mul_mat.offer(node, m, H100)


SMALL = (
    *("mul_mat-*-m[1235]-n96-k256", "mul_mat-*-m17-n96-k256", "mul_mat-*-m64-n96-k256", "mul_mat-*-m128-n96-k256"),
    *("mul_mat-*-m[13]-n48-k256-bias", "mul_mat-*-m1-n31-k512", "mul_mat-*-m5-n33-k96", "mul_mat-*-m1-n7-k32"),
    *("mul_mat-*-m64-n1-k256", "mul_mat-*-m17-n257-k256-bias", "mul_mat-*-tiny-scales", "mul_mat-*-m5-n16-k14336"),
    *("mul_mat-*-outliers", "mul_mat-*-denormals", "mul_mat-*-uneven", "mul_mat-*-zero-row"),
    *("mul_mat_add-*-m3-n96-k512-loud*", "mul_mat_add-*-m5-n576-k96-bias", "mul_mat_add-*-m128-n576-k96"),
    *("gate_up_swiglu-*-m[1358]", "gate_up_swiglu-*-m128", "gate_up_swiglu-*-m[15]-bias"),
    *("qkv-*-m[1358]", "qkv-*-m[15]-bias"),
)
"""Cases that the interpreter is quick with: every kernel, and every branch of it."""
OTHERS = ("f32", "fp8_row", "Q5_0", "Q4_K", "fp8_128x128")
"""Weights for the kernels that take any: each is made e4m3 before it gets there."""

REGISTRY, EVERY = interpreted_jobs(
    backend(mul_mat=offered, mul_mat_add=offered, gate_up_swiglu=offered, qkv=offered), rows=128
)


def wanted(job):
    offers = REGISTRY.offer(case_node(job.case), H100)
    if job.kernel not in offers.kernels or not any(fnmatchcase(job.case.name, pattern) for pattern in SMALL):
        return False
    own = job.kernel.partition(":")[2] in ("dequant", "bf16", "f16")
    return own or (job.case.fields["weight"][0].format in OTHERS[:1] and not job.case.name.endswith("uneven"))


CASES = [job for job in EVERY if wanted(job)]


# numpy, which the interpreter computes with, warns of what silu of far negative numbers divides by.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("job", CASES, ids=[f"{job.kernel}-{job.name}" for job in CASES])
def test_case(job):
    outcome = job.run(REGISTRY)
    assert outcome.passed, outcome.failures
