"""Weights as the kernels of mul_mat keep them, made on the device some rows at a time: no float copy of a whole.

Several weights of one node lie below one another; biases follow, as one float32 plane.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from kernelmux.device import Device
from kernelmux.formats import ALL, Weight, lookup, planes_of_rows, quantize_planes, torch_dtype
from kernelmux.graph import TensorNode
from kernelmux_triton.few_rows_pack import PLANES, pack

CHUNK = 2**24
"""Elements that are decoded at once: 64 MiB of float32."""
TALL = 128
"""Rows that a block of any format spans at most: chunks are multiples of it."""

Stored = list[tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each plane."""


def stored(node: TensorNode, form: str) -> Stored:
    """The planes of a node's weights in a form: a GGUF format of PLANES, a plain format, or one of e4m3."""
    n, k = sum(weight.extents[0] for weight in node.weight), node.weight[0].extents[1]
    if form in PLANES:
        planes: Stored = list(PLANES[form].shapes(n, k))
    else:
        planes = [(plane.shape((n, k)), torch_dtype(plane.dtype)) for plane in lookup(form).planes]
    return [*planes, *([((n,), torch.float32)] if node.bias else [])]


def stored_bytes(node: TensorNode, form: str) -> int:
    """Bytes of these planes."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in stored(node, form))


def packed(weights: Sequence[Weight], form: str, device: Device) -> tuple[torch.Tensor, ...]:
    """The planes of weights [n, k], and of the biases [n] after them."""
    matrices = [weight for weight in weights if len(weight.shape) == 2]
    parts = [_planes(matrix, form, device) for matrix in matrices]
    biases = [bias.dequantize().to(device.torch) for bias in weights[len(matrices) :]]
    together = [_below(planes) for planes in zip(*parts, strict=True)]
    return (*together, *([_below(biases)] if biases else []))


def _below(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _planes(weight: Weight, form: str, device: Device) -> tuple[torch.Tensor, ...]:
    n, k = weight.shape
    if form in PLANES:
        blocks = weight.planes[0]
        made = [torch.empty(shape, dtype=dtype, device=device.torch) for shape, dtype in PLANES[form].shapes(n, k)]
        for rows in _rows(n, k):
            for whole, part in zip(made, pack(form, blocks[rows].to(device.torch)), strict=True):
                whole[rows] = part
        return tuple(made)
    if weight.format == form:
        shapes = [plane.shape(weight.shape) for plane in lookup(form).planes]
        return tuple(part.to(device.torch).view(shape) for part, shape in zip(weight.planes, shapes, strict=True))
    fmt = lookup(form)
    if form == "fp8_row" and weight.format == "fp8_tensor":
        # The weight's one scale is every output's: nothing need be rounded again.
        data, scale = (part.to(device.torch) for part in weight.planes)
        return data, scale.expand(n, 1).contiguous()
    planes = tuple(
        torch.empty(plane.shape(weight.shape), dtype=torch_dtype(plane.dtype), device=device.torch)
        for plane in fmt.planes
    )
    if not fmt.plain and fmt.planes[1].rows == ALL:
        _quantize_whole(weight, *planes)
        return planes
    for rows, part in _chunks(weight):
        quantize_planes(form, part.to(device.torch), planes_of_rows(form, planes, rows))
    return planes


def _rows(n: int, k: int) -> Iterator[slice]:
    step = max(TALL, CHUNK // k // TALL * TALL)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _chunks(weight: Weight) -> Iterator[tuple[slice, torch.Tensor]]:
    """Ranges of a weight's rows, and these rows in float32."""
    n, k = weight.shape
    for rows in _rows(n, k):
        planes = planes_of_rows(weight.format, weight.planes, rows)
        yield rows, replace(weight, shape=(rows.stop - rows.start, k), planes=planes).dequantize()


def _quantize_whole(weight: Weight, data: torch.Tensor, scales: torch.Tensor) -> None:
    """One scale for all: the first pass finds the largest magnitude, the second divides by its share."""
    peak = max(float(part.abs().max()) for _, part in _chunks(weight))
    scales.fill_(peak / torch.finfo(data.dtype).max)
    step = scales.clamp(min=torch.finfo(torch.float32).tiny)
    for rows, part in _chunks(weight):
        data[rows].copy_(part.to(data.device) / step)
