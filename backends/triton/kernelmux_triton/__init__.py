"""The Triton backend: one hook an op, each importing its kernels only when it is asked."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from kernelmux.hookspecs import Declined, hookimpl

if TYPE_CHECKING:
    from kernelmux.device import Device
    from kernelmux.graph import TensorNode
    from kernelmux.hookspecs import Answer

CONTRACT = 1


@hookimpl
def dispatch_mul_mat(node: TensorNode, m: int, device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_triton import mul_mat

    return mul_mat.offer(node, m, device)


@hookimpl
def dispatch_mul_mat_add(node: TensorNode, m: int, device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_triton import mul_mat

    return mul_mat.offer(node, m, device)


@hookimpl
def dispatch_gate_up_swiglu(node: TensorNode, m: int, device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_triton import mul_mat

    return mul_mat.offer(node, m, device)


@hookimpl
def dispatch_qkv(node: TensorNode, m: int, device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_triton import mul_mat

    return mul_mat.offer(node, m, device)


@hookimpl
def dispatch_attention(node: TensorNode, m: int, device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_triton import attention

    return attention.offer(node, m, device)


def refusal(device: Device) -> Declined | None:
    """Why this backend has nothing for a device: no CUDA, too old a card, no Triton."""
    if device.kind != "cuda":
        return Declined(f"its kernels run on CUDA, the plan is for {device.kind}", "device")
    if device.capability is not None and device.capability < (8, 0):
        major, minor = device.capability
        return Declined(f"Triton needs compute capability 8.0, {device.name} has {major}.{minor}", "capability")
    return _missing()


@cache
def _missing() -> Declined | None:
    if find_spec("triton") is None:
        return Declined("Triton is not installed: install triton", "missing dependency")
    return None
