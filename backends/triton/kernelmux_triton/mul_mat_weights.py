"""Weights as the kernels of mul_mat keep them, made on the device.

Several weights of one node lie below one another; biases follow, as one float32 plane.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernelmux.contract.device import Device
from kernelmux.contract.weights import below, converted, row_ranges
from kernelmux.graph.formats import Weight, lookup, torch_dtype
from kernelmux.graph.graph import TensorNode
from kernelmux_triton.few_rows_pack import PLANES, pack

Stored = list[tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each plane."""


def stored(node: TensorNode, form: str) -> Stored:
    """The planes of a node's weights in a form: a format of PLANES, a plain format, or one of e4m3."""
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
    return below(weights, lambda matrix: _planes(matrix, form, device), torch.float32, device)


def _planes(weight: Weight, form: str, device: Device) -> tuple[torch.Tensor, ...]:
    n, k = weight.shape
    if form in PLANES:
        planes = weight.planes
        made = [torch.empty(shape, dtype=dtype, device=device.torch) for shape, dtype in PLANES[form].shapes(n, k)]
        for rows in row_ranges(n, k):
            taken = (plane[rows].to(device.torch) for plane in planes)
            for whole, part in zip(made, pack(form, *taken), strict=True):
                whole[rows] = part
        return tuple(made)
    return converted(weight, form, device)
