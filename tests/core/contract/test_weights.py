"""Weights in other formats: some rows at a time gives what all at once would."""

from __future__ import annotations

import pytest
import torch

from kernelmux.contract import weights
from kernelmux.contract.device import Device
from kernelmux.contract.weights import converted, dequantized_rows, row_ranges
from kernelmux.graph.formats import Value, Weight, dequantize_planes, empty_planes, quantize_planes
from kernelmux.graph.ops.blocks import random_blocks

CPU = Device("cpu")


def stored(format, n=300, k=512):
    """A weight of noise."""
    generator = torch.Generator().manual_seed(1)
    if format == "Q4_K":
        return Weight("w", (n, k), format, (random_blocks(format, (n, k), generator),))
    planes = empty_planes(Value("w", (n, k), format))
    quantize_planes(format, torch.randn(n, k, generator=generator), planes)
    return Weight("w", (n, k), format, planes)


@pytest.mark.parametrize("format", ["bf16", "fp8_tensor", "fp8_row", "fp8_128x128"])
@pytest.mark.parametrize("source", ["f32", "bf16", "Q4_K", "fp8_row", "fp8_block"])
def test_some_rows_at_a_time_is_all_at_once(monkeypatch, format, source):
    weight = stored(source)
    whole = empty_planes(Value("w", weight.shape, format))
    quantize_planes(format, weight.dequantize(), whole)
    monkeypatch.setattr(weights, "HOST_CHUNK", 1)
    assert [rows.start for rows, _ in dequantized_rows(weight, CPU)] == [0, 128, 256]
    for found, wanted in zip(converted(weight, format, CPU), whole, strict=True):
        assert found.float().equal(wanted.float())


@pytest.mark.parametrize("format", ["bf16", "fp8_tensor", "fp8_row", "fp8_128x128"])
def test_a_weight_in_that_format_is_the_model_s_own_memory(format):
    weight = stored(format)
    for found, held in zip(converted(weight, format, CPU), weight.planes, strict=True):
        assert found.data_ptr() == held.data_ptr()


def test_one_scale_becomes_every_rows_without_rounding_again():
    weight = stored("fp8_tensor")
    planes = converted(weight, "fp8_row", CPU)
    assert dequantize_planes("fp8_row", planes).equal(weight.dequantize())


@pytest.mark.parametrize(("n", "k", "multiple"), [(1, 1, 128), (300, 2**17, 128), (300, 2**24, 32), (64, 512, 32)])
def test_ranges_cover_every_row_once(n, k, multiple):
    ranges = list(row_ranges(n, k, multiple))
    assert [row for rows in ranges for row in range(rows.start, rows.stop)] == list(range(n))
    assert all((rows.stop - rows.start) % multiple == 0 for rows in ranges[:-1])
