"""How long kernels of one node take, on random bytes: CUDA graphs replayed, operands rotated past the L2 cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

import torch

from kernelmux.contract.device import Device
from kernelmux.contract.hookspecs import Launch, Tensors
from kernelmux.graph.formats import Value, as_planes, empty_planes
from kernelmux.graph.graph import TensorNode
from kernelmux.measure.ops import copies
from kernelmux.measure.timing import time_launches
from kernelmux_triton.mul_mat_weights import stored

THREADS = 6
"""Kernels that are compiled at once."""


class Tiled(Protocol):
    """A kernel of mul_mat with a tiling of its own."""

    device: Device
    form: str

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]: ...
    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]: ...
    def workspace(self, node: TensorNode) -> int: ...
    def bind(self, node: TensorNode, tensors: Tensors, stream: torch.cuda.Stream) -> Launch: ...


def measure(node: TensorNode, kernels: Sequence[Tiled]) -> list[float | None]:
    """Microseconds a launch of each kernel, in the formats that the first likes best; None for one that fails."""
    first = kernels[0]
    device = first.device
    stream = torch.cuda.Stream(device.index)
    node = replace(
        node,
        inputs=_stored(node.inputs, first.inputs(node)),
        outputs=_stored(node.outputs, first.outputs(node)),
    )
    scratch = max(kernel.workspace(node) for kernel in kernels)
    try:
        operands = list(_rotated(node, first.form, scratch, device))
    except torch.OutOfMemoryError:
        return [None] * len(kernels)
    # The first binding of each compiles, several at a time; what fails then fails again when it is timed.
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda kernel: _attempt(lambda: kernel.bind(node, operands[0], stream)), kernels))
    return [_attempt(lambda kernel=kernel: _timed(kernel, node, operands, stream)) for kernel in kernels]


def _timed(kernel: Tiled, node: TensorNode, operands: Sequence[Tensors], stream: torch.cuda.Stream) -> float:
    calls = [kernel.bind(node, tensors, stream) for tensors in operands]
    return time_launches(calls, kernel.device, stream=stream).median


def _attempt(work: Callable[[], object]) -> float | None:
    """What a measurement gives; None where this tiling does not compile, does not fit or does not start."""
    try:
        found = work()
    except Exception:
        # Of all that a compiler and a launcher may raise nothing makes a plan fail: other tilings are left.
        return None
    return found if isinstance(found, float) else None


def _stored(values: Sequence[Value], formats: Sequence[Sequence[str]]) -> tuple[Value, ...]:
    return tuple(replace(value, format=best[0]) for value, best in zip(values, formats, strict=True))


def _rotated(node: TensorNode, form: str, scratch: int, device: Device) -> Iterator[Tensors]:
    """The node's operands, as often as it takes to outrun the cache; scratch is one, as in a plan."""
    planes = stored(node, form)
    nbytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in planes)
    workspace = torch.empty(scratch, dtype=torch.uint8, device=device.torch) if scratch else None
    for _ in range(copies(nbytes, device)):
        yield Tensors(
            inputs=tuple(as_planes(tuple(map(_noise, empty_planes(value, device.torch)))) for value in node.inputs),
            outputs=tuple(as_planes(empty_planes(value, device.torch)) for value in node.outputs),
            packed=tuple(_noise(torch.empty(shape, dtype=dtype, device=device.torch)) for shape, dtype in planes),
            workspace=workspace,
        )


def _noise(part: torch.Tensor) -> torch.Tensor:
    """The tensor filled with what real ones look like, for a card's clock depends on the bits: floats about zero."""
    if part.dtype == torch.float8_e4m3fn:
        part.copy_(torch.randn(part.shape, device=part.device).mul_(64.0))
    elif part.dtype.itemsize == 1:
        part.view(torch.uint8).random_(0, 120)
    elif part.is_floating_point():
        part.normal_()
    else:
        part.random_(0, 2**14)
    return part
