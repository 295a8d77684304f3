"""sdpa as it is on CUDA, on CPU tensors.

Run by test_interpreted.py.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

import pytest

from fake_backend import backend, pass_or_skip
from kernelmux.conformance.hookup import Job
from kernelmux_torch.cuda import attention
from triton_interpreter import interpreted_jobs


def attention_on_cpu(node, m):
    return attention.offer(node)


WANTED = (
    *("attention-decode-33-*", "attention-decode-200", "attention-mixed-h8*", "attention-mixed-h4-kv2*"),
    *("attention-chunk-7-*", "attention-*empty", "attention-padding-3", "attention-window-8", "attention-*soft-cap*"),
    *("attention-loud", "attention-scale", "attention-pages-of-*", "attention-no-length", "attention-batch"),
)
"""Cases of few rows, which the interpreter takes one after another: every branch, in each format."""

STORED = ("attention-decode-200", "attention-mixed-h4-kv2-d80", "attention-window-8", "attention-no-length")

REGISTRY, EVERY = interpreted_jobs(backend(attention=attention_on_cpu), rows=64)
CASES = [job for job in EVERY if job.variant or any(fnmatchcase(job.name, pattern) for pattern in WANTED)]

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
