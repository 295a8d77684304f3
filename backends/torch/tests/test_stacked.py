"""Stacked products as they are on CUDA, on CPU tensors: one GEMM of several weights, written side by side."""

import pytest
import torch

from kernelmux.conformance.hookup import jobs
from kernelmux.conformance.testing import backend, pass_or_skip
from kernelmux.contract import Tensors
from kernelmux.contract.registry import Registry
from kernelmux_torch import fp8
from kernelmux_torch.cuda import mul_mat

REGISTRY = Registry()
KERNELS = [mul_mat.Bf16(), mul_mat.F16(), fp8.Fp8Row(), fp8.Fp8RowFast()]
REGISTRY.register(backend(qkv=KERNELS, mul_mat_pair=[KERNELS[0], *KERNELS[2:]]), "torch")
CASES = list(jobs("torch", REGISTRY))


@pytest.mark.parametrize("job", CASES, ids=[f"{job.kernel}-{job.name}" for job in CASES])
def test_case(job):
    pass_or_skip(job, REGISTRY)


def test_outputs_side_by_side_are_the_matrix_that_they_were_cut_from():
    matrix = torch.randn(3, 10)
    whole = Tensors((), matrix.split([5, 3, 2], dim=1)).matrix
    assert (whole.data_ptr(), whole.equal(matrix)) == (matrix.data_ptr(), True)
    assert Tensors((), (matrix,)).matrix is matrix
