"""The Triton kernels of rope and copy, and of both in one, interpreted on CPU tensors."""

from fnmatch import fnmatchcase

import pytest

from kernelmux.conformance.testing import backend, pass_or_skip
from offered import offered_on
from triton_interpreter import interpreted_jobs

WANTED = (
    *("rope-*-m1", "rope-*-yarn-m5", "rope-*-at131067", "rope-*-d*-of*", "rope-*-divisors", "rope-halves-h28*"),
    *("copy-*-m5-*", "copy-*padding*", "copy-fp8_row*"),
    *(
        "rope_copy-m5",
        "rope_copy-halves-*",
        "rope_copy-h*",
        "rope_copy-part*",
        "rope_copy-*cache",
        "rope_copy-padding*",
    ),
    *("rope_copy-divisors", "rope_copy-pages*"),
    *("rope_copy-m[15]", "rope_copy-halves-yarn", "rope_copy-h*", "rope_copy-part-*", "rope_copy-*-cache"),
    *("rope_copy-padding-*", "rope_copy-pages-*", "rope_copy-divisors", "rope_copy-outliers"),
)
"""Cases of few rows, which the interpreter takes one after another: every branch, in each format."""

REGISTRY, EVERY = interpreted_jobs(backend(**dict.fromkeys(("rope", "copy", "rope_copy"), offered_on())), rows=64)
CASES = [job for job in EVERY if job.variant or any(fnmatchcase(job.name, pattern) for pattern in WANTED)]


@pytest.mark.parametrize("job", CASES, ids=[f"{job.kernel}-{job.name}" for job in CASES])
def test_case(job):
    pass_or_skip(job, REGISTRY)
