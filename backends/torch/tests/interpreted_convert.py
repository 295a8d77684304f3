"""The Triton kernels of convert, interpreted on CPU tensors: run by test_convert.py in a process of its own."""

from __future__ import annotations

import pytest

from fake_backend import backend
from kernelmux import registry
from kernelmux.conformance.hookup import Filter, jobs
from kernelmux_torch.cuda import convert
from kernelmux_torch.elementwise import FLOATS
from triton_interpreter import round_as_a_device


def on_cpu(node, m):
    source, target = node.inputs[0].format, node.outputs[0].format
    return convert.offer(source, target) if (source in FLOATS) != (target in FLOATS) else None


round_as_a_device()

with registry.isolated(torch=backend(convert=on_cpu)) as interpreted:
    CASES = list(jobs("torch", interpreted, wanted=Filter(op="convert")))


@pytest.mark.parametrize("job", CASES, ids=[f"{job.kernel}-{job.name}" for job in CASES])
def test_case(job):
    outcome = job.run(interpreted)
    if outcome.status == "refused":
        pytest.skip(outcome.reason)
    assert outcome.passed, outcome.failures
