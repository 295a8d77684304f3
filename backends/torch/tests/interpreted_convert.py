"""The Triton kernels of convert, interpreted on CPU tensors: run by test_convert.py in a process of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from fake_backend import backend
from kernelmux import registry
from kernelmux.conformance.hookup import Filter, jobs
from kernelmux.formats import quantize_planes
from kernelmux_torch.cuda import convert
from kernelmux_torch.elementwise import FLOATS


def on_cpu(node, m):
    source, target = node.inputs[0].format, node.outputs[0].format
    return convert.offer(source, target) if (source in FLOATS) != (target in FLOATS) else None


TORCH_TYPES = {tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16}
TORCH_TYPES[tl.float8e4nv] = torch.float8_e4m3fn


def _convert_float(values, source, target, rounding):
    """Through torch: the interpreter's own conversion loses the carry of a mantissa that rounds up to two."""
    bits = torch.from_numpy(np.ascontiguousarray(values))
    rounded = bits.view(TORCH_TYPES[source]).to(TORCH_TYPES[target])
    return rounded.view({1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[rounded.itemsize]).numpy()


interpreter._convert_float = _convert_float

with registry.isolated(torch=backend(convert=on_cpu)) as interpreted:
    CASES = list(jobs("torch", interpreted, wanted=Filter(op="convert")))


@pytest.mark.parametrize("job", CASES, ids=[f"{job.kernel}-{job.name}" for job in CASES])
def test_case(job):
    outcome = job.run(interpreted)
    if outcome.status == "refused":
        pytest.skip(outcome.reason)
    assert outcome.passed, outcome.failures
