"""The kernels of mul_mat and its fused relatives, interpreted on CPU tensors."""

from fnmatch import fnmatchcase

import pytest

from kernelmux.conformance.testing import backend
from kernelmux.graph.graph import case_node
from offered import H100, offered_on
from triton_interpreter import interpreted_jobs

SMALL = (
    *("mul_mat-*-m[35]-n96-k256", "mul_mat-*-m128-n96-k256", "mul_mat-*-m[13]-n48-k256-bias", "mul_mat-*-m5-n33-k96"),
    *("mul_mat-*-m64-n1-k256", "mul_mat-*-m17-n31-k512", "mul_mat-*-tiny-scales", "mul_mat-Q4_K-m5-n16-k14336"),
    *("mul_mat-Q[48]_K-outliers", "mul_mat-*f*-zero-row", "mul_mat-f32-denormals"),
    *("mul_mat_add-*-m3-n96-k512-loud*", "mul_mat_add-*-m5-n576-k96-bias", "mul_mat_add-f32-m128-n576-k96"),
    *("gate_up_swiglu-*-m[15]", "gate_up_swiglu-*-m128", "gate_up_swiglu-Q8_0-m[15]-bias"),
    *("gate_up_swiglu-f32-m5-bias", "gate_up_swiglu-*f16-m3"),
    *("qkv-f32-m[15]", "qkv-*f16-m3", "qkv-Q4_1-m5", "qkv-Q8_0-m[15]-bias", "qkv-f32-m5-bias", "qkv-f32-m128"),
    *("mul_mat_pair-f32-m1", "mul_mat_pair-*f16-m3", "mul_mat_pair-Q8_0-m5-bias", "mul_mat_pair-f32-m5-bias"),
    "mul_mat_pair-f32-m128",
)
"""Cases that the interpreter is quick with: every kernel, and every branch of it."""
ANY = ("fp8_weight", "fp8_row", "fp8_tensor", "fp8_row_fast", "fp8_tensor_fast", "fp8_block")
"""Kernels that take any weight, as it is e4m3 before it gets there: tried on float32."""
OPS = ("mul_mat", "mul_mat_add", "gate_up_swiglu", "qkv", "mul_mat_pair")

REGISTRY, EVERY = interpreted_jobs(backend(**dict.fromkeys(OPS, offered_on())), rows=128)


def wanted(job):
    offers = REGISTRY.offer(case_node(job.case), H100)
    if job.kernel not in offers.kernels or not any(fnmatchcase(job.case.name, pattern) for pattern in SMALL):
        return False
    return job.kernel.partition(":")[2] not in ANY or job.case.fields["weight"][0].format == "f32"


CASES = [job for job in EVERY if wanted(job)]


# numpy, which the interpreter computes with, warns of what silu of far negative numbers divides by.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("job", CASES, ids=[f"{job.kernel}-{job.name}" for job in CASES])
def test_case(job):
    outcome = job.run(REGISTRY)
    assert outcome.passed, outcome.failures


def test_every_kernel_has_cases_of_every_op_that_it_takes():
    """Blocks of 128 rows hold none of the suite's stacked weights."""
    tried = {(job.case.op, job.kernel.partition(":")[2]) for job in CASES}
    stacked = OPS[2:]
    every = {(op, name) for op in OPS for name in (*ANY, "dequant", "bf16", "f16")}
    never = {(op, name) for op in stacked for name in ("fp8_tensor", "fp8_tensor_fast", "fp8_block")}
    assert tried == every - never
