"""Random blocks: what a decoder must cope with is in them."""

import gguf
import pytest
import torch

from kernelmux.graph.formats import BLOCK_WEIGHTS, SUPERBLOCK_WEIGHTS, Value, lookup
from kernelmux.graph.ops.blocks import _BLOCKS, TinyBlocks, random_blocks

formats = pytest.mark.parametrize("name", [*BLOCK_WEIGHTS, *SUPERBLOCK_WEIGHTS])


def _scales(name, blocks):
    """Every float16 of the blocks, a row each."""
    blocks = blocks.view(-1, lookup(name).planes[0].items)
    at = _BLOCKS[name]
    offsets = [at.scale] if at.minimum is None else [at.scale, at.minimum]
    return [blocks[:, offset : offset + 2].contiguous().view(torch.float16) for offset in offsets]


@formats
def test_scales_and_minima_have_both_signs(name):
    for scales in _scales(name, random_blocks(name, (16, 2048), torch.Generator().manual_seed(0))):
        assert (scales > 0).any()
        assert (scales < 0).any()
        assert (scales != 0).all()


@formats
def test_tiny_ones_are_subnormal_or_zero(name):
    for scales in _scales(name, TinyBlocks(Value("w", (16, 2048), name))(torch.Generator().manual_seed(0))):
        assert (scales == 0).any()
        assert (scales != 0).any()
        assert scales.abs().max() < torch.finfo(torch.float16).tiny


@formats
def test_all_values_are_finite_numbers(name):
    for tiny in (False, True):
        blocks = random_blocks(name, (4, 1024), torch.Generator().manual_seed(1), tiny=tiny)
        dense = torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name]))
        assert dense.isfinite().all()
        assert dense.any()
