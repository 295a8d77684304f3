"""The packed form: the file's own bytes, nothing lost, each where few_rows_kernels.py says."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from few_rows_planes import planes as stated_planes
from few_rows_unpack import unpack
from kernelmux.contract.device import Device
from kernelmux.graph.formats import INT4_WEIGHTS, Value, Weight, lookup
from kernelmux.graph.graph import make_node
from kernelmux.graph.ops.blocks import random_blocks, random_groups
from kernelmux_triton import mul_mat_weights
from kernelmux_triton.few_rows_kernels import is_nibbles
from kernelmux_triton.few_rows_pack import NIBBLES, PLANES, pack

CPU = Device("cpu")
BLOCKS = [name for name in PLANES if lookup(name).gguf is not None]


@pytest.mark.parametrize("format", PLANES)
def test_kernels_read_two_numbers_a_byte_where_they_lie_so(format):
    planes = PLANES[format]
    assert is_nibbles(planes.weight) == (planes.items[0] == NIBBLES)


@settings(deadline=None)
@given(format=st.sampled_from(BLOCKS), n=st.integers(1, 9), blocks=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_unpacking_gives_the_file_back(format, n, blocks, seed):
    size = lookup(format).planes[0].items
    stored = torch.randint(256, (n, blocks * size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    planes = pack(format, stored)
    shapes = [(tuple(part.shape), part.dtype) for part in planes]
    assert shapes == PLANES[format].shapes(n, blocks * lookup(format).block)
    assert unpack(format, planes).equal(stored)


@pytest.mark.parametrize("format", BLOCKS)
@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    heights=st.lists(st.sampled_from([1, 2, 127, 128, 129, 257]), min_size=1, max_size=3),
    columns=st.integers(1, 3),
    bias=st.booleans(),
    start=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_any_bytes_of_several_weights_lie_where_the_kernels_read_them(format, heights, columns, bias, start, seed):
    """Scales that are no numbers among them, from blocks that start at any byte, some rows at a time."""
    k, size = columns * lookup(format).block, columns * lookup(format).planes[0].items
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randint(256, (start + sum(heights) * size,), dtype=torch.uint8, generator=generator)[start:]
    weights = [
        Weight("w", (len(blocks), k), format, (blocks,)) for blocks in stored.view(-1, size).split(heights, dim=0)
    ]
    biases = [Weight("b", (n,), "f32", (torch.randn(n, generator=generator),)) for n in heights if bias]
    before = stored.clone()
    with mock.patch("kernelmux.contract.weights.CHUNK", 1):
        packed = mul_mat_weights.packed([*weights, *biases], format, CPU)
    stated = [*stated_planes(format, stored.view(-1, size).numpy()), *([_below(biases)] if bias else [])]
    assert [part.numpy().tobytes() for part in packed] == [part.tobytes() for part in stated]
    assert stored.equal(before)


def _below(biases):
    return np.concatenate([bias.planes[0].numpy() for bias in biases])


@pytest.mark.parametrize("format", PLANES)
def test_packing_some_rows_at_a_time_changes_nothing(format, monkeypatch):
    weight = drawn(format, 300)
    monkeypatch.setattr("kernelmux.contract.weights.CHUNK", 128 * 256)
    planes = mul_mat_weights.packed([weight], format, CPU)
    assert all(part.equal(whole) for part, whole in zip(planes, pack(format, *weight.planes), strict=True))


def drawn(format, rows):
    """A random weight of 256 columns."""
    generator = torch.Generator().manual_seed(0)
    if format in INT4_WEIGHTS:
        return Weight("w", (rows, 256), format, random_groups(format, (rows, 256), generator))
    return Weight("w", (rows, 256), format, (random_blocks(format, (rows, 256), generator),))


@pytest.mark.parametrize("format", INT4_WEIGHTS)
def test_columns_16_apart_share_a_byte_of_4_bit_groups(format):
    weight = drawn(format, 5)
    nibbles, scales, zeros = pack(format, *weight.planes)
    assert (scales.equal(weight.planes[1]), zeros.equal(weight.planes[2])) == (True, True)
    step, zero = (part.float().repeat_interleave(256 // part.shape[1], dim=1) for part in (scales, zeros))
    halves = nibbles.view(5, 8, 16)
    q = torch.stack([halves & 15, halves >> 4], dim=2).view(5, 256)
    assert weight.dequantize().equal(step * (q - zero))


@pytest.mark.parametrize("format", [*PLANES, "bf16", "fp8_row", "fp8_tensor", "fp8_128x128"])
def test_the_stated_bytes_are_those_of_the_planes(format):
    generator = torch.Generator().manual_seed(0)
    if format in PLANES:
        weight = drawn(format, 130)
    else:
        weight = Weight("w", (130, 256), "f32", (torch.randn(130, 256, generator=generator),))
    bias = Weight("b", (130,), "f32", (torch.randn(130, generator=generator),))
    values = {"weight": (Value("w", (130, 256), weight.format),), "bias": (Value("b", (130,)),)}
    node = make_node("mul_mat", "y", Value("x", ("m", 256)), **values)
    planes = mul_mat_weights.packed([weight, bias], format, CPU)
    assert sum(part.nbytes for part in planes) == mul_mat_weights.stored_bytes(node, format)
    assert [(tuple(part.shape), part.dtype) for part in planes] == mul_mat_weights.stored(node, format)


def test_a_nibble_plane_is_hardly_larger_than_the_file():
    node = make_node("mul_mat", "y", Value("x", ("m", 4096)), weight=(Value("w", (4096, 4096), "Q4_K"),))
    assert mul_mat_weights.stored_bytes(node, "Q4_K") < 1.03 * lookup("Q4_K").nbytes((4096, 4096))
