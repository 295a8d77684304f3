"""A model's weight in another format, on a device: some rows at a time, so that no float32 copy of a whole is held.

For what kernels do in `prepare`. Enters: a `Weight` [n, k] as the file has it. Leaves: planes on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kernelmux.contract.device import Device
from kernelmux.graph.formats import ALL, Weight, lookup, planes_of_rows, quantize_planes, torch_dtype

if TYPE_CHECKING:
    import torch

CHUNK, HOST_CHUNK = 2**24, 2**20
"""Elements that are dequantised at once on a device, 64 MiB of float32; and in host memory, which its caches hold."""
TALL = 128
"""Rows that a block of any format spans at most: ranges of rows are multiples of it."""


def row_ranges(n: int, k: int, multiple: int = TALL, elements: int = 0) -> Iterator[slice]:
    """Ranges of a matrix's rows, about so many elements each, or CHUNK; all but the last have a multiple of rows."""
    step = max(multiple, (elements or CHUNK) // k // multiple * multiple)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def dequantized_rows(weight: Weight, device: Device) -> Iterator[tuple[slice, torch.Tensor]]:
    """Ranges of a weight's rows, and these rows in float32 on the device: they go there as they are stored."""
    n, k = weight.shape
    elements = HOST_CHUNK if device.platform.host_memory else CHUNK
    for rows in row_ranges(n, k, elements=elements):
        planes = tuple(part.to(device.torch) for part in planes_of_rows(weight.format, weight.planes, rows))
        yield rows, replace(weight, shape=(rows.stop - rows.start, k), planes=planes).dequantize()


def dense(weight: Weight, dtype: torch.dtype, device: Device) -> torch.Tensor:
    """A weight, of any shape, in `dtype` on the device; the model's own memory where that is what it holds."""
    if lookup(weight.format).plain or len(weight.shape) == 1:
        return weight.dequantize(dtype).to(device.torch)
    return stacked([weight], dtype, device)


def stacked(weights: Sequence[Weight], dtype: torch.dtype, device: Device) -> torch.Tensor:
    """Weights [n, k] below one another, in `dtype` on the device."""
    import torch

    heights = [weight.shape[0] for weight in weights]
    whole = torch.empty(sum(heights), weights[0].shape[1], dtype=dtype, device=device.torch)
    for weight, place in zip(weights, torch.split(whole, heights), strict=True):
        for rows, part in dequantized_rows(weight, device):
            place[rows].copy_(part)
    return whole


def below(
    weights: Sequence[Weight], planes_of: Callable[[Weight], Sequence[torch.Tensor]], dtype: torch.dtype, device: Device
) -> tuple[torch.Tensor, ...]:
    """The planes of matrices [n, k] below one another, each by `planes_of`; of the biases [n] one in `dtype`."""
    import torch

    matrices = [weight for weight in weights if len(weight.shape) == 2]
    parts = [*zip(*map(planes_of, matrices), strict=True)]
    if biases := [dense(bias, dtype, device) for bias in weights[len(matrices) :]]:
        parts.append(tuple(biases))
    return tuple(part[0] if len(part) == 1 else torch.cat(part) for part in parts)


def converted(weight: Weight, format: str, device: Device) -> tuple[torch.Tensor, ...]:
    """The planes of a weight in a plain format or one of kernelmux's own; the model's where it is stored so already."""
    import torch

    fmt = lookup(format)
    if weight.format == format:
        shapes = [plane.shape(weight.shape) for plane in fmt.planes]
        return tuple(part.to(device.torch).view(shape) for part, shape in zip(weight.planes, shapes, strict=True))
    if (weight.format, format) == ("fp8_tensor", "fp8_row"):
        # The weight's one scale is every row's: nothing need be rounded again.
        data, scale = (part.to(device.torch) for part in weight.planes)
        return data, scale.expand(len(data), 1).contiguous()
    planes = tuple(
        torch.empty(plane.shape(weight.shape), dtype=torch_dtype(plane.dtype), device=device.torch)
        for plane in fmt.planes
    )
    if not fmt.plain and fmt.planes[1].rows == ALL:
        _quantize_whole(weight, device, *planes)
        return planes
    for rows, part in dequantized_rows(weight, device):
        quantize_planes(format, part, planes_of_rows(format, planes, rows))
    return planes


def _quantize_whole(weight: Weight, device: Device, data: torch.Tensor, scales: torch.Tensor) -> None:
    """One scale for all: the first pass finds the largest magnitude, the second divides by its share."""
    import torch

    peak = max(float(part.abs().max()) for _, part in dequantized_rows(weight, device))
    scales.fill_(peak / torch.finfo(data.dtype).max)
    step = scales.clamp(min=torch.finfo(torch.float32).tiny)
    for rows, part in dequantized_rows(weight, device):
        data[rows].copy_(part / step)
