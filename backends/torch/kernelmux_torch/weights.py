"""A weight made dense, or quantised, on the device, some rows at a time: no float32 copy of the whole is ever held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from kernelmux.device import Device
from kernelmux.formats import ALL, Weight, lookup, planes_of_rows, quantize_planes, torch_dtype

CHUNK = 2**24
"""Elements that are dequantised at once: 64 MiB of float32."""
TALL = 128
"""Rows that a block of any format spans at most: chunks are multiples of it."""


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
        for rows, part in chunks(weight):
            place[rows].copy_(part)
    return whole


def quantized(weight: Weight, format: str, device: Device) -> tuple[torch.Tensor, ...]:
    """The planes of a weight [n, k] in one of kernelmux's own formats; the model's where it is stored so already."""
    if weight.format == format:
        return tuple(part.to(device.torch) for part in weight.planes)
    planes = tuple(
        torch.empty(plane.shape(weight.shape), dtype=torch_dtype(plane.dtype), device=device.torch)
        for plane in lookup(format).planes
    )
    if lookup(format).planes[1].rows == ALL:
        _quantize_whole(weight, *planes)
        return planes
    for rows, part in chunks(weight):
        quantize_planes(format, part.to(device.torch), planes_of_rows(format, planes, rows))
    return planes


def chunks(weight: Weight) -> Iterator[tuple[slice, torch.Tensor]]:
    """Ranges of a weight's rows, and these rows in float32."""
    n, k = weight.shape
    step = max(TALL, CHUNK // k // TALL * TALL)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        planes = planes_of_rows(weight.format, weight.planes, rows)
        yield rows, replace(weight, shape=(rows.stop - rows.start, k), planes=planes).dequantize()


def _quantize_whole(weight: Weight, data: torch.Tensor, scales: torch.Tensor) -> None:
    """One scale for all: the first pass finds the largest magnitude, the second divides by its share."""
    peak = max(float(part.abs().max()) for _, part in chunks(weight))
    scales.fill_(peak / torch.finfo(data.dtype).max)
    step = scales.clamp(min=torch.finfo(torch.float32).tiny)
    for rows, part in chunks(weight):
        data[rows].copy_(part.to(data.device) / step)
