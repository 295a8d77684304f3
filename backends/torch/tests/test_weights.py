"""Weights made dense: some rows at a time gives what all at once would."""

from __future__ import annotations

import pytest
import torch

from kernelmux.contract.device import Device
from kernelmux.contract.weights import dense
from kernelmux.graph.formats import Value, Weight, empty_planes, quantize_planes
from kernelmux.graph.ops.blocks import random_blocks

CPU = Device("cpu")


@pytest.mark.parametrize("source", ["bf16", "Q4_K", "fp8_row", "fp8_block"])
def test_some_rows_at_a_time_is_all_at_once(monkeypatch, source):
    shape, generator = (300, 512), torch.Generator().manual_seed(1)
    if source == "Q4_K":
        planes = (random_blocks(source, shape, generator),)
    else:
        planes = empty_planes(Value("w", shape, source))
        quantize_planes(source, torch.randn(shape, generator=generator), planes)
    weight = Weight("w", shape, source, planes)
    monkeypatch.setattr("kernelmux.contract.weights.HOST_CHUNK", 1)
    assert dense(weight, torch.bfloat16, CPU).equal(weight.dequantize(torch.bfloat16))
