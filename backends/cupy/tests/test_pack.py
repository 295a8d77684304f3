"""The packed form: the file's own bytes, and nothing lost."""

import pytest
import torch

from kernelmux.contract.device import Device
from kernelmux.graph.formats import Weight, lookup
from kernelmux.graph.ops.blocks import random_blocks
from kernelmux_cupy.pack import TILED, pack, pack_blocks, packed_bytes
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
