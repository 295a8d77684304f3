"""What this backend offers for mul_mat, mul_mat_add, gate_up_swiglu and qkv: few rows, and fp8 for any number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace

from kernelmux.contract.device import Device
from kernelmux.contract.hookspecs import Declined, Kernel
from kernelmux.graph.graph import TensorNode
from kernelmux_triton import fp8
from kernelmux_triton.few_rows import F16, Bf16, Dequant, FewRows, Fp8Weight
from kernelmux_triton.few_rows_pack import PLANES
from kernelmux_triton.fp8 import Fp8Row, Tiling
from kernelmux_triton.measure import measure


def offer(node: TensorNode, m: int, device: Device) -> Sequence[Kernel | Declined]:
    """Every kernel, its tiling for m rows chosen, or why not."""
    return tiled(kernels(node, m, device), with_rows(node, m))


def tiled(answers: Sequence[FewRows | Fp8Row | Declined], node: TensorNode) -> Sequence[FewRows | Fp8Row | Declined]:
    """The same, each kernel's tiling chosen for a node whose row count is known."""
    for kernel in answers:
        if not isinstance(kernel, Declined):
            kernel.chosen(node, measuring(kernel, node))
    return answers


def kernels(node: TensorNode, m: int, device: Device) -> Sequence[FewRows | Fp8Row | Declined]:
    """Every kernel that multiplies up to m rows by all of a node's weights, or why not."""
    few: Sequence[FewRows | Declined] = (dequant(node, device), Bf16(device), F16(device), Fp8Weight(device))
    taken = [kernel if isinstance(kernel, Declined) else kernel.refusal(node, m) or kernel for kernel in few]
    return [*taken, *fp8.offer(node, m, device)]


def measuring(kernel: FewRows | Fp8Row, node: TensorNode) -> Callable[[Sequence[Tiling]], Sequence[float | None]]:
    """What measures a kernel's tilings on a node, on the device that the kernel was offered for."""

    return lambda tilings: measure(node, [retiled(kernel, tiling) for tiling in tilings])


def retiled(kernel: FewRows | Fp8Row, tiling: Tiling) -> FewRows | Fp8Row:
    """The same kernel with that tiling."""
    other = copy(kernel)
    other.tiling = tiling
    return other


def dequant(node: TensorNode, device: Device) -> Dequant | Declined:
    """The kernel of the weights' own blocks."""
    formats = {weight.format for weight in node.weight}
    if len(formats) > 1:
        return Declined(f"it takes weights of one format, not {' and '.join(sorted(formats))}", "format", Dequant.name)
    (format,) = formats
    if format not in PLANES:
        return Declined(f"it takes weights in {', '.join(PLANES)}, not {format}", "format", Dequant.name)
    return Dequant(device, format)


def with_rows(node: TensorNode, m: int) -> TensorNode:
    """The node with m rows, where these may be a symbol still."""
    inputs = tuple(replace(value, shape=(m, *value.shape[1:])) for value in node.inputs)
    outputs = tuple(replace(value, shape=(m, *value.shape[1:])) for value in node.outputs)
    return replace(node, inputs=inputs, outputs=outputs)
