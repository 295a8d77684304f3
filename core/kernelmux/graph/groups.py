"""4-bit integers with a scale and a zero point for each group of a row's columns, as GPTQ and AWQ store weights.

Enters: planes: bytes [n, k/2], whose low four bits are the even columns and whose high ones the odd; scales [n, groups]
in float16 or bfloat16; zero points [n, groups], uint8 from 0 to 16. Leaves: float32 [n, k], scale * (q - zero), exact.
GPTQ: Frantar et al. 2022 (arXiv:2210.17323); AWQ: Lin et al. 2023 (arXiv:2306.00978).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def dequantize_groups(planes: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The numbers [..., k] of planes of 4-bit groups, where they lie."""
    data, scales, zeros = planes
    steps = integers(data).view(*scales.shape, -1).float().sub_(zeros.float().unsqueeze(-1))
    return steps.mul_(scales.float().unsqueeze(-1)).flatten(-2)


def integers(data: torch.Tensor) -> torch.Tensor:
    """uint8 [..., k], 0 to 15, of bytes [..., k/2]."""
    import torch

    return torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)


def in_bytes(integers: torch.Tensor) -> torch.Tensor:
    """The inverse of `integers`."""
    return integers[..., ::2] | integers[..., 1::2] << 4
