"""attention and copy as they are on CUDA, on CPU tensors."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

import pytest

from kernelmux.conformance.hookup import Job, jobs
from kernelmux.conformance.testing import backend, pass_or_skip
from kernelmux.contract import Declined
from kernelmux.contract.registry import Registry
from kernelmux_torch.cuda import attention, copy


def attention_on_cpu(node, m):
    format = node.inputs[1].format
    if node.soft_cap or format == "fp8_row":
        return Declined("not for sdpa", kernel="sdpa")
    return attention.Sdpa() if format == "f32" else attention.SdpaHalf()


WANTED = (
    *("attention-decode-33-*", "attention-decode-200", "attention-mixed-h8*", "attention-mixed-h4-kv2*"),
    *("attention-chunk-7-*", "attention-*empty", "attention-padding-3", "attention-window-8", "attention-*soft-cap*"),
    *("attention-loud", "attention-scale", "attention-pages-of-*", "attention-no-length", "attention-batch"),
)
"""Every branch, in each format."""

STORED = ("attention-decode-200", "attention-mixed-h4-kv2-d80", "attention-window-8", "attention-no-length")

REGISTRY = Registry()
REGISTRY.register(backend(attention=attention_on_cpu), "torch")
CASES = [
    job for job in jobs("torch", REGISTRY) if job.variant or any(fnmatchcase(job.name, pattern) for pattern in WANTED)
]

# The suite's caches are mostly f32. Queries in the cache's own format, and wider.
for case in [job.case for job in CASES if job.kernel == "torch:sdpa" and job.name in STORED]:
    for format, q_format in (("bf16", "bf16"), ("bf16", "f32"), ("f16", "f16"), ("f16", "f32")):
        q, k_cache, v_cache, *state = case.inputs
        caches = [replace(cache, format=format) for cache in (k_cache, v_cache)]
        stored = (replace(q, format=q_format), *caches, *state)
        named = replace(case, name=f"{case.name}-{q_format}-in-{format}", inputs=stored)
        CASES.append(Job(named, "torch:sdpa"))


@pytest.mark.parametrize("job", CASES, ids=[f"{job.kernel}-{job.name}" for job in CASES])
def test_case(job):
    pass_or_skip(job, REGISTRY)


def held_by_a_graph(kernel):
    def hook(node, m):
        declined = node.inputs[3 if node.op == "copy" else 1].format == "fp8_row" or m > 8
        return Declined("not for this one", kernel=kernel.name) if declined else kernel()

    return hook


CAPTURED = Registry()
CAPTURED.register(
    backend(attention=held_by_a_graph(attention.Gathered), copy=held_by_a_graph(copy.Copy)),
    "torch",
)
HELD = [job for job in jobs("torch", CAPTURED) if not job.case.marks & {"drawn", "large", "huge"}]
"""Of what a graph can hold, the cases by hand."""


@pytest.mark.parametrize("job", HELD, ids=[f"{job.kernel}-{job.name}" for job in HELD])
def test_what_a_graph_can_hold(job):
    pass_or_skip(job, CAPTURED)


def test_rows_are_taken_in_parts_where_pages_have_much_room(monkeypatch):
    monkeypatch.setattr(attention, "GATHERED", 1)
    (job,) = [job for job in HELD if job.name == "attention-batch"]
    assert job.run(CAPTURED, "cpu").status == "pass"
