"""The torch backend: one hook an op, each importing its kernels only when it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelmux.contract.hookspecs import Declined, hookimpl
from kernelmux_torch.cuda import without_triton

if TYPE_CHECKING:
    from kernelmux.contract.device import Device
    from kernelmux.contract.hookspecs import Answer
    from kernelmux.graph.graph import TensorNode

CONTRACT = 1


@hookimpl
def dispatch_mul_mat(node: TensorNode, n: int, k: int, weight_format: str, device: Device) -> Answer:
    from kernelmux_torch import fp8, mul_mat
    from kernelmux_torch.cuda import mul_mat as on_cuda

    dense = mul_mat.offer(n, weight_format, bool(node.bias)) if device.kind == "cpu" else on_cuda.offer()
    return [*dense, *fp8.offer(n, k, bool(node.bias), device)]


@hookimpl
def dispatch_mul_mat_add(node: TensorNode, device: Device) -> Answer:
    from kernelmux_torch.cuda import mul_mat

    if device.kind == "cpu":
        return Declined("it is fused on CUDA only", "device")
    return mul_mat.offer_add(bool(node.bias))


@hookimpl
def dispatch_rms_norm(device: Device) -> Answer:
    if device.kind == "cpu":
        from kernelmux_torch import rms_norm

        return rms_norm.RmsNorm()
    from kernelmux_torch.cuda import plain

    return plain.RmsNorm()


@hookimpl
def dispatch_gate_up_swiglu(node: TensorNode, n: int, k: int, device: Device) -> Answer:
    if (refused := _unfused(device)) is not None:
        return refused
    from kernelmux_torch.cuda import gate_up_swiglu

    return gate_up_swiglu.offer(n, k, bool(node.bias), device)


@hookimpl
def dispatch_add() -> Answer:
    from kernelmux_torch.elementwise import Add

    return Add()


@hookimpl
def dispatch_mul() -> Answer:
    from kernelmux_torch.elementwise import Mul

    return Mul()


@hookimpl
def dispatch_silu(device: Device) -> Answer:
    if device.kind == "cpu":
        from kernelmux_torch.elementwise import Silu

        return Silu()
    from kernelmux_torch.cuda import plain

    return plain.Silu()


@hookimpl
def dispatch_convert(source: str, target: str, device: Device) -> Answer:
    from kernelmux_torch import convert

    return convert.offer(source, target, device)


@hookimpl
def dispatch_rope(device: Device) -> Answer:
    if device.kind == "cpu":
        from kernelmux_torch.rope import Rope

        return Rope()
    from kernelmux_torch.cuda import plain

    return plain.Rope()


@hookimpl
def dispatch_qkv_rope_copy(node: TensorNode, cache_format: str, device: Device) -> Answer:
    if (refused := _unfused(device) or _scaled(cache_format)) is not None:
        return refused
    from kernelmux_torch.cuda import qkv

    return qkv.offer(node, device)


@hookimpl
def dispatch_attention(node: TensorNode, cache_format: str, device: Device) -> Answer:
    if (refused := _scaled(cache_format)) is not None:
        return refused
    if device.kind == "cpu":
        from kernelmux_torch import attention

        return attention.offer(node)
    from kernelmux_torch.cuda import attention as on_cuda

    return on_cuda.offer(node)


@hookimpl
def dispatch_copy(cache_format: str, device: Device) -> Answer:
    if (refused := _scaled(cache_format)) is not None:
        return refused
    if device.kind == "cpu":
        from kernelmux_torch.copy import Copy

        return Copy()
    from kernelmux_torch.cuda import plain

    return plain.Copy()


@hookimpl
def dispatch_embed(node: TensorNode, table_format: str, device: Device) -> Answer:
    if device.kind == "cpu":
        from kernelmux_torch import embed

        return embed.offer(table_format)
    from kernelmux_torch.cuda import embed as on_cuda

    return on_cuda.offer(bool(node.weight))


def _unfused(device: Device) -> Declined | None:
    """Why no GEMM has a Triton kernel after it."""
    return Declined("it is fused on CUDA only", "device") if device.kind == "cpu" else without_triton()


def _scaled(cache_format: str) -> Declined | None:
    """Why a cache with scales is not for torch."""
    if cache_format in ("f32", "bf16", "f16"):
        return None
    return Declined(f"it takes caches in f32, bf16 or f16, not {cache_format}: kernelmux-triton reads it", "format")
