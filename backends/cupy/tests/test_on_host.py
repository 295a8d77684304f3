"""What the CUDA C of the plain ops computes, on machines without a GPU: conformance cases of few rows, on the host."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

import cuda_on_host as on_host
from kernelmux.conformance.testing import backend, few_rows, pass_or_skip
from kernelmux_cupy import attention, copy, elementwise, embed, norm, rope

WANTED = (
    *("rms_norm-m5-k*", "rms_norm-tiny", "rms_norm-huge", "rms_norm-zero*", "rms_norm-denormals"),
    *("add_rms_norm-m5-k*", "add_rms_norm-tiny", "add_rms_norm-uneven"),
    *("swiglu-m5-n*", "swiglu-far", "swiglu-m3-n1", "silu-far", "silu-m5-n127", "add-m5-n2049", "mul-m5-n127"),
    *("swiglu-zero*", "swiglu-denormals", "silu-m5-n1"),
    *("rope-*-m1", "rope-*-yarn-m5", "rope-*-at131067", "rope-*-d*-of*", "rope-*-divisors", "rope-halves-h28*"),
    *("copy-*-m5-*", "copy-*padding*", "copy-far", "copy-f16-m5-h1-d80"),
    *("embed-*-m5-*", "embed-*-tiny-scales", "embed-*-m2-k512", "embed-*-m3-*", "embed-*-far", "embed-rows*"),
    *("attention-decode-33-*", "attention-decode-200", "attention-mixed-h8*", "attention-mixed-h4-kv2*"),
    *("attention-chunk-7-*", "attention-*empty", "attention-padding-3", "attention-window-8", "attention-outliers"),
    *("attention-loud", "attention-scale", "attention-pages-of-*", "attention-no-length", "attention-batch"),
    *("attention-bf16-[msw]*", "attention-f16-mixed", "attention-unseen-nan*", "attention-soft-cap-h[489]-*"),
)
"""Every branch, in each format."""

ROWS = 64
MODULES = (attention, copy, elementwise, embed, norm, rope)


def _jobs():
    plugin = backend(
        rms_norm=norm.RmsNorm(),
        add_rms_norm=norm.AddRmsNorm(),
        add=elementwise.Add(),
        mul=elementwise.Mul(),
        silu=elementwise.Silu(),
        swiglu=elementwise.Swiglu(),
        rope=rope.Rope(),
        copy=lambda node, m: copy.offer(node.inputs[3].format),
        embed=lambda node, m: embed.offer((*node.inputs, *node.weight)[1].format),
        attention=attention.offer,
    )
    offered, few = few_rows(plugin, ROWS)
    return offered, [job for job in few if job.variant or any(fnmatchcase(job.name, one) for one in WANTED)]


REGISTRY, CASES = _jobs()


@pytest.fixture(autouse=True)
def _on_host(monkeypatch):
    if on_host.COMPILER is None:
        pytest.skip("g++, which compiles the CUDA C for the processor, is not installed")
    for module in MODULES:
        monkeypatch.setattr(module, "function", on_host.function)
        monkeypatch.setattr(module, "bind", on_host.bind)


@pytest.mark.slow
@pytest.mark.parametrize("job", CASES, ids=[job.name for job in CASES])
def test_case(job, monkeypatch):
    # As if the device were small, so that batches are not split; a single row is, as far as it goes.
    if job.case.inputs[0].shape[0] > 1:
        monkeypatch.setattr(attention, "BLOCKS", 24)
    pass_or_skip(job, REGISTRY)
