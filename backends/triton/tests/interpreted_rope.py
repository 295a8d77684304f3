"""The Triton kernels of rope and copy, interpreted on CPU tensors."""

from fnmatch import fnmatchcase

import pytest

from kernelmux.conformance.testing import backend, pass_or_skip
from kernelmux_triton import copy, rope
from triton_interpreter import interpreted_jobs

WANTED = (
    *("rope-*-m1", "rope-*-yarn-m5", "rope-*-at131067", "rope-*-d*-of*", "rope-*-divisors", "rope-halves-h28*"),
    *("copy-*-m5-*", "copy-*padding*", "copy-fp8_row*"),
)
"""Cases of few rows, which the interpreter takes one after another: every branch, in each format."""

REGISTRY, EVERY = interpreted_jobs(backend(rope=rope.Rope(), copy=copy.Copy()), rows=64)
CASES = [job for job in EVERY if job.variant or any(fnmatchcase(job.name, pattern) for pattern in WANTED)]


@pytest.mark.parametrize("job", CASES, ids=[f"{job.kernel}-{job.name}" for job in CASES])
def test_case(job):
    pass_or_skip(job, REGISTRY)
