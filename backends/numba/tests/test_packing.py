"""Weights in panels: what every lane, input and group holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelmux.contract import Device
from kernelmux.errors import BackendError
from kernelmux.graph.formats import Weight, lookup
from kernelmux.graph.ops.blocks import random_blocks
from kernelmux_numba.packing import BLOCK, PACKINGS, SUPERBLOCK, packed, packed_bytes, packing_of, panels_of
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
    end, count = packing.steps_at(lanes, blocks), packing.parts * (2 if packing.minimum else 1)
    scales, kind = panels[:, blocks * size : end].contiguous(), torch.uint8 if packing.minimum else torch.int8
    numbers = scales.view(kind if packing.steps else torch.float16).view(len(panels), blocks, count, lanes).double()
    if packing.steps:
        steps = panels[:, end:][:, : blocks // SUPERBLOCK * packing.step_bytes(lanes)].contiguous().view(torch.float16)
        steps = steps.view(len(panels), blocks // SUPERBLOCK, -1, lanes).double()
        numbers *= steps.repeat_interleave(SUPERBLOCK, 1).repeat_interleave(packing.parts, 2)
    fields = numbers.view(len(panels), blocks, -1, packing.parts, lanes).permute(2, 0, 4, 1, 3).flatten(1, 2)
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
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_numbers_lie_an_input_after_the_other_in_each_panel(dtype):
    values = torch.randn(21, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    name = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    target = TARGETS["avx2"]
    panels = panels_of(Weight("w", (21, 5), name, (values,)), target).view(dtype).view(3, 5, 8)
    assert panels.mT.reshape(24, 5)[:21].equal(values)
    assert not panels.mT.reshape(24, 5)[21:].any()


@pytest.mark.parametrize("scale", [60_000.0, 6e-5, 6e-8])
@pytest.mark.parametrize("format", ["Q4_K", "Q5_K", "Q6_K"])
def test_scales_of_k_quants_are_held_however_large_or_small(format, scale):
    blocks = random_blocks(format, (16, 512), torch.Generator().manual_seed(0))
    at, scales = (208, slice(192, 208)) if format == "Q6_K" else (0, slice(4, 16))
    size = blocks.shape[1] // 2
    blocks[3, at : at + 2] = blocks[3, size + at : size + at + 2] = stored_half(scale)
    blocks[3, scales] = 63
    weight, target = Weight("blk.0", (16, 512), format, (blocks,)), TARGETS["avx2"]
    found, wanted = unpacked(packed(weight, target), format, 16, 512, target)[3], weight.dequantize().double()[3]
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-6 * float(wanted.abs().max()))


def stored_half(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float16).view(torch.uint8)


@pytest.mark.parametrize(("format", "at"), [("Q4_0", 0), ("Q4_K", 0), ("Q6_K", 208)])
@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
def test_a_scale_that_is_no_number_is_said(format, at, scale):
    blocks = random_blocks(format, (16, 256), torch.Generator().manual_seed(0))
    blocks[3, at : at + 2] = stored_half(scale)
    with pytest.raises(BackendError, match=r"^blk\.0 has a scale that is infinite, or no number$"):
        packed(Weight("blk.0", (16, 256), format, (blocks,)), TARGETS["avx2"])
