"""The packed form: the file's own bytes, and nothing lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from few_rows_unpack import unpack
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Value, Weight, lookup
from kernelmux.graph.graph import make_node
from kernelmux.graph.ops.blocks import random_blocks
from kernelmux_triton import mul_mat_weights
from kernelmux_triton.few_rows_pack import PLANES, pack

CPU = Device("cpu")


@settings(deadline=None)
@given(
    format=st.sampled_from(sorted(PLANES)), n=st.integers(1, 9), blocks=st.integers(1, 5), seed=st.integers(0, 2**31)
)
def test_unpacking_gives_the_file_back(format, n, blocks, seed):
    size = lookup(format).planes[0].items
    stored = torch.randint(256, (n, blocks * size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    planes = pack(format, stored)
    shapes = [(tuple(part.shape), part.dtype) for part in planes]
    assert shapes == PLANES[format].shapes(n, blocks * lookup(format).block)
    assert unpack(format, planes).equal(stored)


@pytest.mark.parametrize("format", PLANES)
def test_packing_some_rows_at_a_time_changes_nothing(format, monkeypatch):
    blocks = random_blocks(format, (300, 256), torch.Generator().manual_seed(0))
    monkeypatch.setattr("kernelmux.contract.weights.CHUNK", 128 * 256)
    planes = mul_mat_weights.packed([Weight("w", (300, 256), format, (blocks,))], format, CPU)
    assert all(part.equal(whole) for part, whole in zip(planes, pack(format, blocks), strict=True))


@pytest.mark.parametrize("format", [*PLANES, "bf16", "fp8_row", "fp8_tensor", "fp8_128x128"])
def test_the_stated_bytes_are_those_of_the_planes(format):
    generator = torch.Generator().manual_seed(0)
    if format in PLANES:
        weight = Weight("w", (130, 256), format, (random_blocks(format, (130, 256), generator),))
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
