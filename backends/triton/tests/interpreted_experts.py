"""Routing, products by chosen experts and their sums, interpreted on CPU tensors."""

from fnmatch import fnmatchcase

import pytest
import torch

from kernelmux.conformance.testing import backend, one_node
from kernelmux.contract import Tensors
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import case_node
from kernelmux_triton import experts
from offered import H100, offered_on
from triton_interpreter import interpreted_jobs

SMALL = (
    *(
        "route-m5-*",
        "route-2-of-*",
        "route-1-of-1-*",
        "route-4-of-60-*",
        "route-all",
        "route-ties",
        "route-equal",
        "route-sigmoid-*",
    ),
    *("expert_sum-m[15]-of[28]-*", "expert_sum-zero-row"),
    *("mul_mat_id-*f*-m2", "mul_mat_id-Q[48]_[0K]-m[25]", "mul_mat_id-Q4_1-m5", "mul_mat_id-f32-own-m3"),
    "mul_mat_id-int4_*-m[25]",
    *("mul_mat_id-f32-bias-m[39]", "mul_mat_id-Q8_0-bias-m9", "mul_mat_id-*f*-odd*", "mul_mat_id-f32-zero-row"),
    *("mul_mat_id-f32-one-m33", "mul_mat_id-bf16-one-m33"),
)
"""Cases that the interpreter is quick with: every kernel, and every branch of it."""
OPS = ("route", "mul_mat_id", "expert_sum")

REGISTRY, EVERY = interpreted_jobs(backend(**dict.fromkeys(OPS, offered_on())), rows=33)


def wanted(job):
    offers = REGISTRY.offer(case_node(job.case), H100)
    if job.kernel not in offers.kernels or not any(fnmatchcase(job.case.name, pattern) for pattern in SMALL):
        return False
    name, formats = job.kernel.partition(":")[2], [weight.format for weight in job.case.fields.get("weight", ())]
    # Weights of any other format are dense before they get there.
    return name == "dequant" or formats in ([], [name])


CASES = [job for job in EVERY if wanted(job)]


@pytest.mark.parametrize("job", CASES, ids=[f"{job.kernel}-{job.name}" for job in CASES])
def test_case(job):
    outcome = job.run(REGISTRY)
    assert outcome.passed, outcome.failures


def test_every_kernel_has_cases():
    tried = {(job.case.op, job.kernel.partition(":")[2]) for job in CASES}
    products = {("mul_mat_id", name) for name in ("f32", "bf16", "f16", "dequant")}
    assert tried == products | {("route", "f32"), ("expert_sum", "f32")}


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
@pytest.mark.parametrize("logits", [torch.nan, -torch.inf, torch.inf])
def test_experts_are_in_range_and_different_whatever_the_logits_are(logits):
    """Rows that pad a step hold anything, and an expert that is not there would be read."""
    node = one_node("route", Value("logits", (2, 5)), top_k=3)
    ids, weights = torch.full((2, 3), -1, dtype=torch.int32), torch.empty(2, 3)
    given = torch.full((2, 5), logits)
    experts.Route().bind(node, Tensors((given,), (ids, weights)), None)()
    assert ids.tolist() == [[0, 1, 2]] * 2
