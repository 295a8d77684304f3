"""What torch's int4 kernel is given, to the bit: integers, and scales and offsets in bfloat16."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from int4_planes import planes
from kernelmux.conformance.testing import one_node
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Value, Weight, lookup
from kernelmux_torch.mul_mat import Int4, Int8


@pytest.mark.parametrize("format", ["Q4_0", "Q4_1", "Q8_0"])
@settings(derandomize=True, deadline=None, max_examples=25)
@given(sixteens=st.integers(1, 10), columns=st.integers(1, 9), start=st.integers(0, 5), seed=st.integers(0, 2**31))
def test_blocks_are_what_plain_numpy_says(format, sixteens, columns, start, seed):
    """From blocks that start at any byte, of scales up to the largest."""
    n, size, k = 16 * sixteens, columns * lookup(format).planes[0].items, 32 * columns
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randint(256, (start + n * size,), dtype=torch.uint8, generator=generator)
    blocks = stored[start:].view(n, columns, -1)
    for byte in (1, 3) if format == "Q4_1" else (1,):
        # Of float16's exponents the largest is for what is no finite number.
        blocks[..., byte][blocks[..., byte] & 0x7C == 0x7C] &= 0xBF
    before, kernel = stored.clone(), (Int8 if format == "Q8_0" else Int4)()
    packed = kernel.prepare([Weight("w", (n, k), format, (blocks.flatten(1),))], Device("cpu"))
    integers, scales = map(torch.from_numpy, planes(format, blocks.flatten(1).numpy()))
    assert packed[0].equal(torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1))
    assert packed[1].equal(scales.bfloat16())
    assert stored.equal(before)
    node = one_node("mul_mat", Value("x", (1, k)), weight=(Value("w", (n, k), format),))
    assert sum(part.nbytes for part in packed) == kernel.packed_bytes(node)
