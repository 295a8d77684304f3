"""The Triton kernels of attention, interpreted on CPU tensors."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

import pytest

from kernelmux.conformance.hookup import Job
from kernelmux.conformance.testing import backend, pass_or_skip
from offered import H100, offered_on
from triton_interpreter import interpreted_jobs

# As if the card were small: several sequences a program and several programs a sequence.
SMALL = replace(H100, processors=3)

WANTED = {
    "decode": (
        *("attention-decode-33-*", "attention-decode-200", "attention-mixed-h8*", "attention-mixed-h4-kv2*"),
        *("attention-chunk-7-*", "attention-*empty", "attention-padding-3", "attention-window-8"),
        *("attention-soft-cap-h9*", "attention-window-soft-cap", "attention-loud", "attention-scale"),
        *("attention-pages-of-*", "attention-no-length", "attention-batch", "attention-idle", "attention-unseen-nan*"),
        *("attention-fp8_row-*", "attention-sinks-*", "attention-chunked-*"),
    ),
    "prefill": (
        *("attention-decode-33-h32*", "attention-mixed-h4-kv2*", "attention-chunk-7-*", "attention-*empty"),
        *("attention-window-8", "attention-window-soft-cap", "attention-bf16-unseen-nan-pages-of-256*"),
        *("attention-no-length", "attention-idle", "attention-unseen-nan-window"),
        *("attention-sinks-mixed-h9*", "attention-sinks-window*", "attention-sinks-no-length", "attention-sinks-at*"),
        *("attention-sinks-unseen-nan", "attention-sinks-bf16", "attention-sinks-f16", "attention-sinks-fp8_row"),
        *("attention-chunked-[18]", "attention-chunked-at-*", "attention-chunked-long", "attention-chunked-[bfuw]*"),
        *("attention-fp8_row-window", "attention-fp8_row-mixed", "attention-fp8_row-*nan", "attention-fp8_row-h4*"),
    ),
}
"""Cases of few rows, which the interpreter takes one after another: every branch."""

STORED = ("attention-mixed-h4-kv2-d80",)

REGISTRY, EVERY = interpreted_jobs(backend(attention=offered_on(SMALL)), rows=256)
CASES = [
    job
    for job in EVERY
    if job.variant or any(fnmatchcase(job.name, pattern) for pattern in WANTED[job.kernel.partition(":")[2]])
]

# The suite's caches are mostly f32. Queries in the cache's own format, and wider.
for job in [job for job in CASES if job.name in STORED]:
    for format, q_format in (("bf16", "f32"), ("f16", "f16")):
        q, k_cache, v_cache, *state = job.case.inputs
        caches = [replace(cache, format=format) for cache in (k_cache, v_cache)]
        stored = (replace(q, format=q_format), *caches, *state)
        name = f"{job.case.name}-{q_format}-in-{format}"
        CASES.append(Job(replace(job.case, name=name, inputs=stored), job.kernel))


@pytest.mark.parametrize("job", CASES, ids=[f"{job.kernel}-{job.name}" for job in CASES])
def test_case(job):
    pass_or_skip(job, REGISTRY)
