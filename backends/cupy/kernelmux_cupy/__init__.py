"""The CuPy backend: CUDA C kernels, one hook an op, each importing its kernels only when it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelmux.hookspecs import hookimpl
from kernelmux_cupy.source import refusal

if TYPE_CHECKING:
    from kernelmux.device import Device
    from kernelmux.graph import TensorNode
    from kernelmux.hookspecs import Answer

CONTRACT = 1


@hookimpl
def dispatch_mul_mat(node: TensorNode, m: int, device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_cupy import mul_mat

    return mul_mat.offer(node, m)


@hookimpl
def dispatch_mul_mat_add(node: TensorNode, m: int, device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_cupy import mul_mat

    return mul_mat.offer_add(node, m)


@hookimpl
def dispatch_qkv(node: TensorNode, m: int, device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_cupy import mul_mat

    return mul_mat.offer_qkv(node, m)


@hookimpl
def dispatch_gate_up_swiglu(node: TensorNode, m: int, device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_cupy import mul_mat

    return mul_mat.offer_gate_up_swiglu(node, m)


@hookimpl
def dispatch_convert(source: str, target: str, device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_cupy import convert

    return convert.offer(source, target)
