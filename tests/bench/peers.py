"""torch's own products on a CUDA card, on as many operands as outrun the L2 cache: what kernels are timed beside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from kernelmux.contract.device import Device
from kernelmux.measure.ops import copies
from kernelmux.models.random import random_planes

Calls = list[Callable[[], object]]


def fp8_calls(device: Device, scheme: str, fast: bool, m: int, n: int, k: int) -> Calls:
    """cuBLASLt's product of e4m3 operands, scaled as `scheme` (fp8_tensor, fp8_row, fp8_block) says."""
    stored = "fp8_128x128" if scheme == "fp8_block" else scheme
    generator = torch.Generator(device.torch).manual_seed(0)
    x, w = random_planes(scheme, (m, k), generator, 1.0), random_planes(stored, (n, k), generator, k**-0.5)
    bytes_once = m * k + n * k + 2 * m * n
    return [_fp8_call(scheme, fast, *(part.clone() for part in (*x, *w))) for _ in range(copies(bytes_once, device))]


def _fp8_call(
    scheme: str, fast: bool, x: torch.Tensor, xs: torch.Tensor, w: torch.Tensor, ws: torch.Tensor
) -> Callable[[], object]:
    if scheme != "fp8_block":
        out = torch.empty(len(x), len(w), dtype=torch.bfloat16, device=x.device)
        # torch tells the scheme from the scales' shapes: one number, or a column and a row of them.
        options = {"out_dtype": torch.bfloat16, "use_fast_accum": fast, "out": out}
        return partial(torch._scaled_mm, x, w.t(), xs, ws.t(), **options)
    from torch.nn.functional import ScalingType, scaled_mm

    # cuBLASLt wants the scales of w padded to fours along k.
    padded = ws.new_zeros(len(ws), -(-ws.shape[1] // 4) * 4)
    padded[:, : ws.shape[1]] = ws
    recipes = (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128)
    return partial(scaled_mm, x, w.t(), xs.t(), recipes[0], padded.t(), recipes[1], output_dtype=torch.bfloat16)


def bf16_calls(device: Device, m: int, n: int, k: int) -> Calls:
    """cuBLAS in bfloat16."""
    x = torch.randn(m, k, device=device.torch, dtype=torch.bfloat16)
    weights = [torch.randn(n, k, device=device.torch, dtype=torch.bfloat16) for _ in range(copies(2 * n * k, device))]
    return [partial(torch.mm, x, weight.t()) for weight in weights]


def int4_calls(device: Device, n: int, k: int, group: int = 32) -> Calls:
    """torch's product of one row with 4-bit weights in groups of 32, as Q4_0 has them: 5 bits a weight."""
    x = torch.randn(1, k, device=device.torch, dtype=torch.bfloat16)
    integers = torch.randint(256, (n, k // 2), dtype=torch.uint8, device=device.torch)
    packed = torch.ops.aten._convert_weight_to_int4pack(integers, 8)
    scales = torch.randn(k // group, n, 2, device=device.torch, dtype=torch.bfloat16)
    return [
        partial(torch.ops.aten._weight_int4pack_mm, x, packed.clone(), group, scales.clone())
        for _ in range(copies(n * k * 5 // 8, device))
    ]
