"""The CuPy backend: CUDA C kernels, one hook an op, each importing its kernels only when it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelmux.contract.hookspecs import hookimpl
from kernelmux_cupy.source import refusal

if TYPE_CHECKING:
    from kernelmux.contract.device import Device
    from kernelmux.contract.hookspecs import Answer
    from kernelmux.graph.graph import TensorNode

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

    return mul_mat.offer_fused(node, m)


@hookimpl
def dispatch_qkv(node: TensorNode, m: int, device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_cupy import mul_mat

    return mul_mat.offer_fused(node, m)


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


@hookimpl
def dispatch_rms_norm(hidden_dim: int, device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_cupy import norm

    return norm.offer(norm.RmsNorm(), hidden_dim)


@hookimpl
def dispatch_add_rms_norm(hidden_dim: int, device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_cupy import norm

    return norm.offer(norm.AddRmsNorm(), hidden_dim)


@hookimpl
def dispatch_add(device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_cupy import elementwise

    return elementwise.Add()


@hookimpl
def dispatch_mul(device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_cupy import elementwise

    return elementwise.Mul()


@hookimpl
def dispatch_silu(device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_cupy import elementwise

    return elementwise.Silu()


@hookimpl
def dispatch_swiglu(device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_cupy import elementwise

    return elementwise.Swiglu()


@hookimpl
def dispatch_rope(device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_cupy.rope import Rope

    return Rope()


@hookimpl
def dispatch_copy(cache_format: str, device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_cupy import copy

    return copy.offer(cache_format)


@hookimpl
def dispatch_embed(table_format: str, device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_cupy import embed

    return embed.offer(table_format)


@hookimpl
def dispatch_attention(node: TensorNode, m: int, device: Device) -> Answer:
    if (refused := refusal(device)) is not None:
        return refused
    from kernelmux_cupy import attention

    return attention.offer(node, m)
