"""Weights made dense on the device, one or several below one another."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernelmux.contract.device import Device
from kernelmux.contract.weights import dequantized_rows
from kernelmux.graph.formats import Weight, lookup


def dense(weight: Weight, dtype: torch.dtype, device: Device) -> torch.Tensor:
    """The weight in `dtype` on the device; the model's own memory where that is what it holds."""
    if lookup(weight.format).plain:
        return weight.dequantize(dtype).to(device.torch)
    return stacked([weight], dtype, device)


def stacked(weights: Sequence[Weight], dtype: torch.dtype, device: Device) -> torch.Tensor:
    """Weights [n, k] below one another, in `dtype` on the device."""
    heights = [weight.shape[0] for weight in weights]
    whole = torch.empty(sum(heights), weights[0].shape[1], dtype=dtype, device=device.torch)
    for weight, place in zip(weights, whole.split(heights), strict=True):
        for rows, part in dequantized_rows(weight):
            place[rows].copy_(part)
    return whole
