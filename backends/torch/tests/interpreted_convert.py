"""The Triton kernels of convert, interpreted on CPU tensors: run by test_interpreted.py."""

import pytest

from fake_backend import backend
from kernelmux_torch.cuda import convert
from kernelmux_torch.elementwise import FLOATS
from triton_interpreter import interpreted_jobs


def on_cpu(node, m):
    source, target = node.inputs[0].format, node.outputs[0].format
    return convert.offer(source, target) if (source in FLOATS) != (target in FLOATS) else None


REGISTRY, CASES = interpreted_jobs(backend(convert=on_cpu), rows=512)


@pytest.mark.parametrize("job", CASES, ids=[f"{job.kernel}-{job.name}" for job in CASES])
def test_case(job):
    outcome = job.run(REGISTRY)
    if outcome.status == "refused":
        pytest.skip(outcome.reason)
    assert outcome.passed, outcome.failures
