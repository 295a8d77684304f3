"""Bit fields and numbers within blocks of bytes, wherever they lie and at whatever byte they start; and the inverse."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def words(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes [blocks, w] as numbers [blocks, w / their size]: copied, for a view would have to start at an even byte."""
    import torch

    return packed.clone(memory_format=torch.contiguous_format).view(dtype)


def half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """A float16 number of each block, in float32 [blocks, 1]."""
    import torch

    return words(blocks[:, start : start + 2], torch.float16).float()


def fields(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The fields of so many bits of each byte, lowest first: [blocks, ..., w] as [blocks, ..., 8 / bits, w]."""
    import torch

    *blocks, width = packed.shape
    found = packed.new_empty(*blocks, 8 // bits, width)
    for number in range(8 // bits):
        torch.bitwise_right_shift(packed, bits * number, out=found[..., number, :])
    return found.bitwise_and_(2**bits - 1)


def in_order(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The fields of bytes [blocks, w], those of a byte beside each other, lowest first: [blocks, 8 / bits * w]."""
    return fields(packed, bits).mT.flatten(1)


def joined(parts: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `fields`: numbers below 2^bits in bytes [blocks, ..., 8 / bits, w] as bytes [blocks, ..., w]."""
    found = parts[..., 0, :].clone()
    for number in range(1, 8 // bits):
        found |= parts[..., number, :] << bits * number
    return found


def as_bytes(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers [blocks, n] as their bytes [blocks, n * their size]."""
    import torch

    return numbers.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def as_half(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers as float16 holds them, in float32: those too small for it keep their sign, as its least magnitude."""
    import torch

    least = torch.where(numbers == 0, 0.0, torch.copysign(torch.full_like(numbers, 2.0**-24), numbers))
    return torch.where(numbers.abs() < 2.0**-24, least, numbers.half().float())
