"""Blocks that are made are those that are read, with no more error than llama.cpp's own quantisers leave."""

from __future__ import annotations

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelmux.graph.dequantize import dequantize_blocks
from kernelmux.graph.formats import FORMATS
from kernelmux.graph.ops.blocks import random_blocks
from kernelmux.graph.quantize import QUANTIZE, quantize_blocks

SUPERBLOCKS = ("Q4_K", "Q5_K", "Q6_K")
BY_GGUF = [name for name in QUANTIZE if name not in SUPERBLOCKS]

# NMSE of ggml_quantize_chunk of llama.cpp b11739 (0ce8cd114), without an importance matrix, for the numbers of
# `numbers`, measured through its shared library; the gguf package has no quantisers of these.
LLAMA_CPP = {
    "Q4_K": {"normal": 5.1004e-03, "shifted": 6.9878e-04, "outliers": 5.7308e-03},
    "Q5_K": {"normal": 1.3020e-03, "shifted": 1.7466e-04, "outliers": 2.2311e-03},
    "Q6_K": {"normal": 3.1353e-04, "shifted": 1.4391e-04, "outliers": 9.8214e-04},
}


def numbers(kind):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(512, 1024, generator=generator)
    if kind == "shifted":
        return torch.rand(512, 1024, generator=generator) * 0.1 + 0.02
    if kind == "outliers":
        return values * (1 + 50 * (torch.rand(512, 1024, generator=generator) < 0.002))
    return values


def stored(name, values):
    """What is left of numbers that were stored so."""
    blocks = quantize_blocks(name, values.reshape(-1, FORMATS[name].block))
    assert blocks.dtype == torch.uint8
    assert blocks.shape[1] == FORMATS[name].planes[0].items
    return dequantize_blocks(name, blocks).view(values.shape)


def nmse(values, truth):
    return float((values - truth).double().square().sum() / truth.double().square().sum())


@pytest.mark.parametrize("kind", ["normal", "shifted", "outliers"])
@pytest.mark.parametrize("name", BY_GGUF)
def test_the_error_is_no_worse_than_that_of_the_gguf_package(name, kind):
    values = numbers(kind)[:64]
    number = gguf.GGMLQuantizationType[name]
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(values.numpy(), number), number))
    assert nmse(stored(name, values), values) <= 1.002 * nmse(theirs, values)


@pytest.mark.parametrize("kind", ["normal", "shifted", "outliers"])
@pytest.mark.parametrize("name", SUPERBLOCKS)
def test_the_error_is_no_worse_than_that_of_llama_cpp(name, kind):
    assert nmse(stored(name, numbers(kind)), numbers(kind)) <= 1.002 * LLAMA_CPP[name][kind]


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q4_1", "Q5_1", "Q8_0", "MXFP4"])
def test_what_is_stored_so_already_stays_nearly_what_it_is(name):
    """Random levels that a block may hold, of which not every one has its first or its last."""
    if name == "MXFP4":
        blocks = torch.randint(0, 256, (256, 17), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        blocks[:, 0] = 100
    else:
        blocks = random_blocks(name, (64, 128), torch.Generator().manual_seed(0)).view(256, -1)
    values = dequantize_blocks(name, blocks)
    assert nmse(stored(name, values), values) < 3e-4


@pytest.mark.parametrize("name", QUANTIZE)
def test_numbers_beyond_what_scales_hold_and_zeros(name):
    block = FORMATS[name].block
    zeros = torch.zeros(3, block)
    assert stored(name, zeros).equal(zeros)
    same = torch.full((1, block), 0.37)
    assert nmse(stored(name, same), same) < 1e-2
    one = torch.zeros(1, block)
    one[0, block // 3] = -5.0
    assert nmse(stored(name, one), one) < 5e-2
    huge = torch.randn(1, block) * 1e30
    if name == "MXFP4":  # whose scales reach as far as float32
        assert nmse(stored(name, huge), huge) < 0.1
    else:
        assert not stored(name, huge).isfinite().all()


@pytest.mark.parametrize("name", QUANTIZE)
@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-12, 12), sparse=st.floats(0, 1), shift=st.floats(-2, 2))
def test_nothing_is_worse_than_zeros(name, seed, exponent, sparse, shift):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 256, generator=generator) + shift
    values = values * (torch.rand(2, 256, generator=generator) < sparse) * 2.0**exponent
    error = (stored(name, values) - values).double().square().sum()
    assert float(error) <= 1.001 * float(values.double().square().sum())


@pytest.mark.parametrize("name", QUANTIZE)
def test_blocks_do_not_depend_on_their_neighbours(name):
    values = numbers("outliers")[:8, :256].reshape(-1, FORMATS[name].block)
    whole = quantize_blocks(name, values)
    for at in (0, len(values) // 2, len(values) - 1):
        assert quantize_blocks(name, values[at : at + 1]).equal(whole[at : at + 1])
