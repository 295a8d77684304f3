"""GEMMs with a kernel of kernelmux-triton after them, that interpreted on CPU tensors: run by test_interpreted.py."""

import pytest

from fake_backend import backend, pass_or_skip
from kernelmux.contract.device import Device
from kernelmux_torch import _scaled
from kernelmux_torch.cuda import gate_up_swiglu, qkv
from triton_interpreter import interpreted_jobs

CPU = Device("cpu")


def qkv_on_cpu(node, m):
    k_cache = next(value for value in node.inputs if value.name == "k_cache")
    return _scaled(k_cache.format) or qkv.offer(node, CPU)


def gate_up_on_cpu(node, m):
    return [] if node.bias else [gate_up_swiglu.GateUpBf16(), gate_up_swiglu.GateUpFp8Row()]


REGISTRY, CASES = interpreted_jobs(backend(qkv_rope_copy=qkv_on_cpu, gate_up_swiglu=gate_up_on_cpu))


# numpy, which the interpreter computes with, warns of the infinity that silu of far negative numbers divides by.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("job", CASES, ids=[f"{job.kernel}-{job.name}" for job in CASES])
def test_case(job):
    pass_or_skip(job, REGISTRY)
