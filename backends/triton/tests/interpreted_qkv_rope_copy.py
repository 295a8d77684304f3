"""qkv_rope_copy by each product that it is offered with, interpreted on CPU tensors."""

from fnmatch import fnmatchcase

import pytest

from kernelmux.conformance.testing import backend, pass_or_skip
from kernelmux.contract.device import Device
from kernelmux_triton import qkv_rope_copy
from triton_interpreter import interpreted_jobs

H100 = Device("cuda", 0, "NVIDIA H100 80GB HBM3", (9, 0))
WANTED = ("*-f32-m5", "*-bf16-m5", "*-Q8_0-m1", "*-Q8_0-bias-halves", "*-cache-*", "*-divisors")
"""Cases that the interpreter is quick with: every kernel, and every branch of it."""


def offered(node, m):
    return qkv_rope_copy.offer(node, m, H100)


REGISTRY, EVERY = interpreted_jobs(backend(qkv_rope_copy=offered), rows=64)
CASES = [job for job in EVERY if any(fnmatchcase(job.name, pattern) for pattern in WANTED)]


@pytest.mark.parametrize("job", CASES, ids=[f"{job.kernel}-{job.name}" for job in CASES])
def test_case(job):
    pass_or_skip(job, REGISTRY)
