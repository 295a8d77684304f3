"""GGUF's blocks in float32: to the bit what the gguf package reads, whatever their bytes and wherever they start."""

from __future__ import annotations

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelmux.graph.dequantize import UNPACK, dequantize_blocks
from kernelmux.graph.formats import FORMATS, Weight, lookup

BLOCKS = [name for name, fmt in FORMATS.items() if fmt.gguf is not None and not fmt.plain]


def expected(name: str, blocks: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name]))


def any_bytes(name: str, count: int, seed: int) -> torch.Tensor:
    """Blocks of any bytes, scales that are infinite or no number among them."""
    size = lookup(name).planes[0].items
    return torch.randint(256, (count, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """To the bit, but that one NaN is as good as another."""
    numbers = ~wanted.isnan()
    bits = found.view(torch.int32)[numbers].equal(wanted.view(torch.int32)[numbers])
    return bits and bool(found.isnan().equal(wanted.isnan())) and found.shape == wanted.shape


def test_every_type_of_block_is_taken_apart_where_it_lies():
    assert sorted(UNPACK) == sorted(BLOCKS)


@pytest.mark.parametrize("name", BLOCKS)
@settings(derandomize=True, deadline=None, max_examples=20)
@given(count=st.integers(1, 70), seed=st.integers(0, 2**31))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_any_bytes_are_what_the_gguf_package_reads(name, count, seed):
    blocks = any_bytes(name, count, seed)
    assert same(dequantize_blocks(name, blocks), expected(name, blocks))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_byte_of_a_block_counts_in_every_value(name):
    """Each of a block's bytes takes all its values, beside others that are usual."""
    size = lookup(name).planes[0].items
    usual = torch.arange(size, dtype=torch.uint8).mul(37).remainder(64)
    for at in range(size):
        blocks = usual.repeat(256, 1)
        blocks[:, at] = torch.arange(256, dtype=torch.uint8)
        assert same(dequantize_blocks(name, blocks), expected(name, blocks)), at


@pytest.mark.parametrize("start", [1, 2, 3])
@pytest.mark.parametrize(("rows", "count"), [(1, 1), (5, 3)])
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_a_weight_is_read_from_where_it_lies(name, rows, count, start):
    """As in a mapped file, at whatever byte: one block, and rows of several."""
    blocks = any_bytes(name, rows * count, 1) & 0x3F
    columns = count * lookup(name).block
    whole = torch.zeros(start + blocks.numel(), dtype=torch.uint8)
    whole[start:] = blocks.flatten()
    weight = Weight("w", (rows, columns), name, (whole[start:].view(rows, -1),))
    assert same(weight.dequantize(), expected(name, blocks).view(rows, columns))
    assert weight.dequantize(torch.bfloat16).equal(expected(name, blocks).view(rows, columns).bfloat16())
