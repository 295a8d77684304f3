"""Each variant of the attention kernels compiled for an H100, as it would be bound there: it fits and spills little."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton, which compiles the kernels, is not installed")

from kernelmux.conformance.testing import one_node
from kernelmux.contract import Declined, Tensors
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import PAGE_SIZE
from kernelmux_triton import decode, prefill
from offered import offers
from triton_compiled import SHARED, compile_for_h100, planes_of

SPILLED = {"f32": 1024, "f32-d256": 1024, "f32-queries-d256": 640, "window-cap": 384}
"""Bytes a thread that may leave the registers: of float32 products, which no matrix unit makes, and of many masks."""


def node(m, seqs=4, heads=32, kv_heads=8, dim=128, cache="bf16", q="bf16", page_size=16, **fields):
    shape = (1024, page_size, kv_heads, dim)
    values = (
        Value("q", (m, heads * dim), q),
        Value("k_cache", shape, cache),
        Value("v_cache", shape, cache),
        Value("query_start", (seqs + 1,), "i32"),
        Value("kv_len", (seqs,), "i32"),
        Value("block_table", (seqs, 256), "i32"),
    )
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "scale": dim**-0.5}
    return one_node("attention", *values, format=q, **sizes, **fields)


VARIANTS = {
    "bf16": {},
    "one-row": {"m": 1, "seqs": 1},
    "many-sequences": {"m": 256, "seqs": 256},
    "f32-queries": {"q": "f32"},
    "f32-queries-d256": {"q": "f32", "dim": 256, "heads": 8, "kv_heads": 4},
    "f16": {"cache": "f16", "q": "f16"},
    "f32": {"cache": "f32", "q": "f32"},
    "f32-d256": {"cache": "f32", "q": "f32", "dim": 256, "heads": 8, "kv_heads": 4, "page_size": 256},
    "fp8": {"cache": "fp8_row"},
    "fp8-f32-queries": {"cache": "fp8_row", "q": "f32", "page_size": 256},
    "fp8-d16": {"cache": "fp8_row", "dim": 16, "heads": 4, "kv_heads": 2},
    "fp8-d256": {"cache": "fp8_row", "dim": 256, "heads": 8, "kv_heads": 4},
    "pages-of-64": {"page_size": 64},
    "pages-of-256": {"page_size": 256},
    "window": {"window": 1024},
    "window-cap": {"window": 1024, "soft_cap": 50.0, "page_size": 256},
    "chunk": {"chunk": 8192},
    "chunk-f32-queries": {"chunk": 8192, "q": "f32", "page_size": 256},
    "sinks": {"dim": 64, "heads": 64, "page_size": 64, "window": 128, "weight": (Value("sinks", (64,)),)},
    "d64": {"dim": 64, "heads": 9, "kv_heads": 3},
    "d80": {"dim": 80, "page_size": 256},
    "d96": {"dim": 96, "heads": 8, "kv_heads": 1},
    "d256": {"dim": 256, "heads": 8, "kv_heads": 4},
    "multi-query": {"heads": 64, "kv_heads": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_kernels_fit_an_h100(name, variant, monkeypatch, tmp_path):
    case = node(**{"m": 32 if name == "decode" else 2048} | VARIANTS[variant])
    (kernel,) = [answer for answer in offers(case) if getattr(answer, "name", "") == name]
    bound = []
    for module in (decode, prefill):
        monkeypatch.setattr(module, "bind", lambda *args, num_warps, **_: bound.append((args[0], args[2:], num_warps)))
    scratch = decode.torch.empty(kernel.workspace(case), dtype=decode.torch.uint8, device="meta")
    inputs, outputs = (tuple(map(planes_of, values)) for values in (case.inputs, case.outputs))
    packed = tuple(map(planes_of, case.weight))
    kernel.bind(case, Tensors(inputs, outputs, packed, scratch), None)
    for function, args, warps in bound:
        needs = compile_for_h100(function, args, warps, tmp_path)
        assert needs.shared <= SHARED
        assert needs.spilled <= SPILLED.get(variant, 192)


def offered(m, **fields):
    return [
        (isinstance(answer, Declined), answer.kernel if isinstance(answer, Declined) else answer.name)
        for answer in offers(node(m, **fields))
    ]


def test_the_kernel_for_so_many_rows_comes_first():
    assert offered(64) == [(False, "decode"), (False, "prefill")]
    assert offered(65) == [(False, "prefill"), (False, "decode")]
    assert offered(257) == [(False, "prefill"), (True, "decode")]


@pytest.mark.parametrize(
    ("fields", "copied"),
    [
        ({"page_size": PAGE_SIZE}, True),
        ({"page_size": 16}, False),
        ({"page_size": 16, "dim": 256, "heads": 8, "kv_heads": 4}, False),
        ({"page_size": 64, "dim": 80}, False),
        ({"page_size": 64, "cache": "f32", "q": "f32"}, False),
        ({"page_size": 64, "cache": "fp8_row"}, False),
    ],
)
def test_the_copy_engine_takes_pages_of_whole_tiles(fields, copied):
    case = node(2048, **fields)
    assert offers(case)[0].tuning(case).copies == copied
    (small, *_) = offers(case, Device("cuda", 0, "NVIDIA L4", (8, 9)))
    assert not small.tuning(case).copies


def test_refusals_name_what_would_work():
    for fields, kind, named in (
        ({"cache": "Q8_0"}, "format", "fp8_row"),
        ({"dim": 512}, "shape", "256"),
        ({"dim": 65, "cache": "fp8_row"}, "alignment", "pairs"),
    ):
        refusals = offers(node(1, **fields))
        assert [refused.kernel for refused in refusals] == ["decode", "prefill"]
        assert {refused.kind for refused in refusals} == {kind}
        assert all(named in refused.reason for refused in refusals)
    _, refused = offers(node(1, heads=128, kv_heads=1))
    assert refused.kernel == "decode"
    assert "prefill" in refused.reason


def test_scratch_grows_with_the_card_and_hardly_with_the_rows():
    kernel, _ = offers(node(1))
    of_a_row = 3 * 8 * 4
    assert kernel.workspace(node(1)) - of_a_row == 264 * 2 * 16 * (128 + 2) * 4
    assert kernel.workspace(node(64)) == kernel.workspace(node(1)) + 63 * of_a_row
