"""The packed form: the file's own bytes, nothing lost, each where `cuda/formats.cuh` says."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelmux.contract.device import Device
from kernelmux.graph.formats import Weight, lookup
from kernelmux.graph.ops.blocks import random_blocks
from kernelmux_cupy.pack import TILED, pack, pack_blocks, packed_bytes
from tiles import tiles
from unpacking import unpack

CPU = Device("cpu")
SHAPES = [(64, 512), (33, 256), (1, 1024), (96, 64), (7, 32), (40, 96)]


def blocks_of(format, n, k):
    return random_blocks(format, (n, k), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("format", TILED)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_unpacking_gives_the_file_back(format, n, k):
    if k % lookup(format).block:
        pytest.skip(f"{format} has no rows of {k} columns: its blocks do not fit them")
    blocks = blocks_of(format, n, k)
    packed = pack(Weight("w", (n, k), format, (blocks,)), CPU)
    assert packed.numel() == packed_bytes(format, n, k)
    assert unpack(format, packed, n, k).equal(blocks)


@pytest.mark.parametrize("format", TILED)
def test_whole_groups_of_rows_take_no_more_bytes_than_the_file(format):
    assert packed_bytes(format, 4096, 14336) == lookup(format).nbytes((4096, 14336))


def test_packing_some_rows_at_a_time_changes_nothing(monkeypatch):
    blocks = blocks_of("Q6_K", 100, 512)
    monkeypatch.setattr("kernelmux.contract.weights.CHUNK", 32 * 512)
    assert pack(Weight("w", (100, 512), "Q6_K", (blocks,)), CPU).equal(pack_blocks("Q6_K", blocks, 512))


@pytest.mark.parametrize("format", TILED)
@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    n=st.sampled_from([1, 31, 32, 33, 100]),
    columns=st.sampled_from([1, 2, 3, 8, 10]),
    start=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_any_bytes_lie_where_the_kernel_reads_them(format, n, columns, start, seed):
    """Scales that are no numbers among them, from blocks that start at any byte, some rows at a time."""
    k, size = columns * lookup(format).block, columns * lookup(format).planes[0].items
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (start + n * size,), dtype=torch.uint8, generator=generator)[start:].view(n, size)
    before = blocks.clone()
    with mock.patch("kernelmux.contract.weights.CHUNK", 1):
        packed = pack(Weight("w", (n, k), format, (blocks,)), CPU)
    stated = torch.from_numpy(tiles(format, blocks.numpy(), k))
    assert packed.equal(stated)
    assert blocks.equal(before)
    assert packed.nbytes == packed_bytes(format, n, k)
