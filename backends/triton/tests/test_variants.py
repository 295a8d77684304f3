"""Tilings as variants: stated, shipped, and the same in every process."""

import json
from importlib.resources import files

import pytest
import torch

from kernelmux.conformance.asking import watched
from kernelmux.conformance.hookup import all_cases
from kernelmux.contract import Declined, Device, registry
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import case_node, make_node
from kernelmux.measure.table import DEFAULT, Tables
from offered import H100, offers

pytest.importorskip("triton")

TABLES = [json.loads(file.read_text("utf-8")) for file in (files("kernelmux_triton") / "tunings").iterdir()]
FORMATS = {"dense": ("bf16", "f16"), "q4_0": ("Q4_0",), "q4_1": ("Q4_1",), "q8_0": ("Q8_0",), "q4_k": ("Q4_K",)}


def product(n, k, m=1, format="Q4_K", op="mul_mat"):
    weights = tuple(Value(f"w{index}", (n, k), format) for index in range(2 if op == "gate_up_swiglu" else 1))
    return make_node(op, "y", Value("x", (m, k)), weight=weights)


def offered(node, device=H100):
    return registry.current().offer(node, device, only="triton").kernels


@pytest.mark.parametrize("m", [1, 3, 16, 64, 100, 2048])
def test_nodes_of_one_work_have_the_same_variants_whatever_their_rows(m):
    covered = 1 << (m - 1).bit_length()
    for name, kernel in offered(product(4096, 4096, m)).items():
        node, other = product(4096, 4096, m), product(4096, 4096, covered)
        assert kernel.work(node) == kernel.work(other), name
        assert list(map(str, kernel.variants(node))) == list(map(str, kernel.variants(other))), name
        assert len(set(map(str, kernel.variants(node)))) == len(kernel.variants(node)) > 1, name


def test_a_small_matrix_has_no_choice():
    assert all(len(kernel.variants(product(96, 256))) == 1 for kernel in offered(product(96, 256)).values())


def test_the_shipped_table_is_taken_for_its_card_and_for_its_architecture_and_else_the_default():
    table = next(table for table in TABLES if H100.name in table["cards"])
    node = product(4096, 4096, 1, "bf16")
    kernel = offered(node)["triton:bf16"]
    for device, source in (
        (H100, f"shipped for {H100.name}"),
        (Device("cuda", 0, "NVIDIA H900", (9, 0)), "shipped for "),
        (Device("cuda", 0, "NVIDIA B200", (10, 0)), DEFAULT),
    ):
        variant, known_from = Tables(device).pick(kernel, node)
        assert known_from.startswith(source)
        expected = str(kernel.variants(node)[0]) if source == DEFAULT else table["choices"]["dense m1 4096x4096"]
        assert str(variant) == expected


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table["cards"][0])
def test_every_entry_of_a_shipped_table_names_a_variant_that_there_is(table):
    """Else it is dead: a plan would pass it over in silence."""
    known = {}
    for work in table["choices"]:
        name, rows, extents = work.rsplit(" ", 2)
        m, (n, k) = int(rows[1:]), map(int, extents.split("x"))
        gated = name.endswith(" gated")
        op = "gate_up_swiglu" if gated else "mul_mat"
        # Few rows count the rows of gate and up, many those of their product.
        for height in {n, n // 2} if gated else {n}:
            for formats in FORMATS.values():
                for format in formats:
                    node = product(height, k, m, format, op)
                    for kernel in offered(node).values():
                        known.setdefault(kernel.work(node), set()).update(map(str, kernel.variants(node)))
    odd = {work: variant for work, variant in table["choices"].items() if variant not in known.get(work, ())}
    assert not odd


def test_asking_calls_no_cuda_and_writes_nothing(monkeypatch):
    """Of all of the suite's cases: the answers are the node's and the device's alone."""

    def called(*args, **kwargs):
        raise AssertionError("CUDA was called")

    offers(product(4096, 4096))  # Imports what it needs.
    for name in ("device_count", "is_available", "current_stream", "get_device_properties", "get_device_name", "init"):
        monkeypatch.setattr(torch.cuda, name, called)
    with watched(Device("cpu")) as seen:
        for case in all_cases():
            node = case_node(case)
            for kernel in offers(node):
                if not isinstance(kernel, Declined):
                    kernel.inputs(node), kernel.outputs(node), kernel.packed_bytes(node), kernel.workspace(node)
                    kernel.variants(node), kernel.work(node)
    assert seen == []
