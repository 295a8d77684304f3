"""Weights in other formats: some rows at a time gives what all at once would, to the bit what plain numpy says."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelmux.contract import weights
from kernelmux.contract.device import Device
from kernelmux.contract.weights import below, converted, dense, dequantized_rows, row_ranges, stacked
from kernelmux.graph.formats import FORMATS, Value, Weight, dequantize_planes, empty_planes, quantize_planes
from kernelmux.graph.ops.blocks import random_blocks
from stated import converted as stated_planes
from stated import placed, random_weight, raw, rounded, values

CPU = Device("cpu")
SOURCES = [name for name, fmt in FORMATS.items() if fmt.gguf is not None and name != "i32"]
FP8 = ["fp8_tensor", "fp8_row", "fp8_128x128"]


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


def test_ranges_are_as_long_as_the_module_says_when_they_are_made(monkeypatch):
    assert len(list(row_ranges(300, 512))) == 1
    monkeypatch.setattr(weights, "CHUNK", 32 * 512)
    assert [(rows.start, rows.stop) for rows in row_ranges(100, 512, 32)] == [(0, 32), (32, 64), (64, 96), (96, 100)]


@st.composite
def weights_below(draw, source):
    """One to three matrices of as many columns, rows that cross the ranges' borders, somewhere in memory; biases."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    block = FORMATS[source].block
    columns = draw(st.integers(1, 3)) * (block if block > 1 else draw(st.sampled_from([1, 33, 128])))
    heights = draw(st.lists(st.sampled_from([1, 127, 128, 129, 260]), min_size=1, max_size=3))
    start, mapped = draw(st.sampled_from([1, 3, 5])), draw(st.booleans())
    shapes = [*((n, columns) for n in heights), *((n,) for n in heights if draw(st.shared(st.booleans())))]
    made = [random_weight("w", shape, source if len(shape) == 2 else "f32", generator) for shape in shapes]
    return [placed(weight, start, mapped) for weight in made]


def equal_bytes(found, wanted):
    """Planes to the bit, however long."""
    return [raw(plane).tobytes() for plane in found] == [np.ascontiguousarray(part).tobytes() for part in wanted]


@pytest.mark.parametrize("source", [*SOURCES, *FP8])
@settings(derandomize=True, deadline=None, max_examples=8)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_what_is_dense_is_what_plain_numpy_says(source, data):
    given, plain = data.draw(weights_below(source)), data.draw(st.sampled_from(["f32", "bf16", "f16"]))
    matrices = [weight for weight in given if len(weight.shape) == 2]
    dtype = FORMATS[plain].dtype
    wanted = [rounded(values(weight), plain) for weight in given]
    with mock.patch.multiple(weights, CHUNK=1, HOST_CHUNK=1):
        assert equal_bytes([dense(weight, dtype, CPU) for weight in given], wanted)
        assert equal_bytes([stacked(matrices, dtype, CPU)], [np.concatenate(wanted[: len(matrices)])])


@pytest.mark.parametrize("source", [*SOURCES, *FP8])
@settings(derandomize=True, deadline=None, max_examples=8)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_what_is_converted_lies_below_one_another_as_plain_numpy_says(source, data):
    given = data.draw(weights_below(source))
    matrices = [weight for weight in given if len(weight.shape) == 2]
    fitting = [name for name in (*FP8, "bf16", "f16") if FORMATS[name].check(matrices[0].shape) is None]
    format = data.draw(st.sampled_from(fitting))
    parts = zip(*(stated_planes(weight, format) for weight in matrices), strict=True)
    wanted = [np.concatenate([part.view(np.uint8).ravel() for part in several]) for several in parts]
    if biases := [rounded(values(weight), "bf16") for weight in given[len(matrices) :]]:
        wanted.append(np.concatenate(biases))
    with mock.patch.multiple(weights, CHUNK=1, HOST_CHUNK=1):
        found = below(given, lambda weight: converted(weight, format, CPU), torch.bfloat16, CPU)
    assert equal_bytes(found, wanted)
