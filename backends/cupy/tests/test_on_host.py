"""What the CUDA C of the plain ops computes, on machines without a GPU: conformance cases of few rows, on the host."""

from __future__ import annotations

import types
from fnmatch import fnmatchcase

import pytest

import cuda_on_host as on_host
import kernelmux_cupy
from kernelmux.conformance.testing import few_rows, pass_or_skip
from kernelmux.contract import CONTRACT, hookimpl
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
PLAIN = (attention, copy, elementwise, embed, norm, rope)


def _jobs():
    """Of the backend's kernels those that run on the host too, offered there."""
    plain = {module.__name__ for module in PLAIN}
    classes = [kernel for kernel in kernelmux_cupy.kernel_classes() if kernel.__module__ in plain]
    plugin = types.SimpleNamespace(CONTRACT=CONTRACT, kernel_classes=hookimpl(lambda: classes))
    offered, few = few_rows(plugin, ROWS)
    return offered, [job for job in few if job.variant or any(fnmatchcase(job.name, one) for one in WANTED)]


REGISTRY, CASES = _jobs()


@pytest.fixture(autouse=True)
def _on_host(monkeypatch):
    if on_host.COMPILER is None:
        pytest.skip("g++, which compiles the CUDA C for the processor, is not installed")
    for module in PLAIN:
        monkeypatch.setattr(module, "function", on_host.function)
        monkeypatch.setattr(module, "bind", on_host.bind)


@pytest.mark.slow
@pytest.mark.parametrize("job", CASES, ids=[job.name for job in CASES])
def test_case(job, monkeypatch):
    # As if the device were small, so that batches are not split; a single row is, as far as it goes.
    blocks = 24 if job.case.inputs[0].shape[0] > 1 else 528
    monkeypatch.setattr(attention, "_at_once", lambda device: blocks)
    pass_or_skip(job, REGISTRY)
