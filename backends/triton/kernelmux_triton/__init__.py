"""The Triton backend: one hook an op, each importing its kernels only when it is asked."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from kernelmux.contract.hookspecs import Declined, hookimpl

if TYPE_CHECKING:
    from kernelmux.contract.device import Device
    from kernelmux.contract.hookspecs import Answer
    from kernelmux.graph.graph import TensorNode

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


@hookimpl
def dispatch_rms_norm(device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_triton import norm

    return norm.RmsNorm()


@hookimpl
def dispatch_add_rms_norm(device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_triton import norm

    return norm.AddRmsNorm()


@hookimpl
def dispatch_add(device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_triton import elementwise

    return elementwise.Add()


@hookimpl
def dispatch_mul(device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_triton import elementwise

    return elementwise.Mul()


@hookimpl
def dispatch_silu(device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_triton import elementwise

    return elementwise.Silu()


@hookimpl
def dispatch_swiglu(device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_triton import elementwise

    return elementwise.Swiglu()


@hookimpl
def dispatch_rope(device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_triton import rope

    return rope.Rope()


@hookimpl
def dispatch_copy(device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_triton import copy

    return copy.Copy()


@hookimpl
def dispatch_embed(node: TensorNode, device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_triton import embed

    return embed.offer(bool(node.weight))


@hookimpl
def dispatch_convert(source: str, target: str, device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_triton import convert

    return convert.offer(source, target, device)


@hookimpl
def dispatch_qkv_rope_copy(node: TensorNode, m: int, device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_triton import qkv_rope_copy

    return qkv_rope_copy.offer(node, m, device)


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
