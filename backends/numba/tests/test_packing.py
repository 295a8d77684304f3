"""Weights in panels: what every lane, input and group holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelmux.contract import Device
from kernelmux.errors import BackendError
from kernelmux.graph.formats import Weight, lookup
from kernelmux.graph.ops.blocks import random_blocks
from kernelmux_numba.packing import BLOCK, PACKINGS, packed, packed_bytes, packing_of, panels_of
from kernelmux_numba.target import Target, target_of

TARGETS = {name: target_of(Device("cpu", arch=name)) for name in ("", "avx2", "amx")}


def unpacked(panels: torch.Tensor, format: str, n: int, k: int, target: Target) -> torch.Tensor:
    """The numbers [n, k] that panels hold, by the layout that kernelmux_numba.packing describes."""
    packing, lanes, blocks = packing_of(format, target), target.lanes, k // BLOCK
    size = packing.integer_bytes(lanes)
    stored = panels[:, : blocks * size].view(len(panels), blocks, -1, lanes, 4)
    if packing.bits == 8:
        integers = stored if not packing.signed else stored.view(torch.int8)
    else:
        low = torch.stack([stored[:, :, :4] & 15, stored[:, :, :4] >> 4], dim=3).flatten(2, 3)
        size_of_more = packing.bits - 4
        more = [
            (stored[:, :, 4 + step * size_of_more // 8] >> step * size_of_more % 8) & (2**size_of_more - 1)
            for step in range(8 if size_of_more else 0)
        ]
        integers = low + 16 * torch.stack(more, dim=2) if more else low
    # [panels, blocks, vectors, lanes, 4] as rows of inputs.
    rows = integers.permute(0, 3, 1, 2, 4).reshape(-1, blocks, packing.parts, packing.group).double()
    halves = panels[:, blocks * size :][:, : blocks * packing.scale_bytes(lanes)].contiguous().view(torch.float16)
    fields = halves.view(len(panels), blocks, -1, packing.parts, lanes).permute(2, 0, 4, 1, 3).flatten(1, 2).double()
    values = (rows - packing.centre) * fields[0].unsqueeze(-1)
    if packing.minimum:
        values += fields[1].unsqueeze(-1)
    return values.flatten(1)[:n]


@pytest.mark.parametrize("format", PACKINGS)
@pytest.mark.parametrize("arch", TARGETS)
@settings(derandomize=True, deadline=None, max_examples=10)
@given(n=st.integers(1, 70), blocks=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_panels_hold_the_weights_numbers(format, arch, n, blocks, seed):
    k, target = blocks * lookup(format).block, TARGETS[arch]
    weight = Weight("w", (n, k), format, (random_blocks(format, (n, k), torch.Generator().manual_seed(seed)),))
    panels = packed(weight, target)
    assert panels.nbytes == packed_bytes(format, n, k, target.lanes)
    found, wanted = unpacked(panels, format, n, k, target), weight.dequantize().double()
    # Of K-quants scales are products, rounded to float16; other formats lose nothing.
    tolerance = 1e-3 * float(wanted.abs().max()) if format.endswith("_K") else 1e-6
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_numbers_lie_an_input_after_the_other_in_each_panel(dtype):
    values = torch.randn(21, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    name = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    target = TARGETS["avx2"]
    panels = panels_of(Weight("w", (21, 5), name, (values,)), target).view(dtype).view(3, 5, 8)
    assert panels.mT.reshape(24, 5)[:21].equal(values)
    assert not panels.mT.reshape(24, 5)[21:].any()


def test_a_scale_that_float16_does_not_hold_is_said():
    blocks = random_blocks("Q4_K", (16, 256), torch.Generator().manual_seed(0))
    blocks[3, :2] = torch.tensor([60_000.0], dtype=torch.float16).view(torch.uint8)
    blocks[3, 4:16] = 63
    with pytest.raises(BackendError, match=r"^blk\.0 has a scale that is infinite, or beyond what float16 holds$"):
        packed(Weight("blk.0", (16, 256), "Q4_K", (blocks,)), TARGETS["avx2"])
