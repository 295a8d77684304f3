"""The reference backend: every op as its contract defines it, in float32 and in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelmux.contract.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kernelmux.contract.hookspecs import Kernel

CONTRACT = 1


@hookimpl
def dispatch_mul_mat() -> Sequence[Kernel]:
    return _offer()


@hookimpl
def dispatch_rms_norm() -> Sequence[Kernel]:
    return _offer()


@hookimpl
def dispatch_add() -> Sequence[Kernel]:
    return _offer()


@hookimpl
def dispatch_rope() -> Sequence[Kernel]:
    return _offer()


@hookimpl
def dispatch_attention() -> Sequence[Kernel]:
    return _offer()


@hookimpl
def dispatch_copy() -> Sequence[Kernel]:
    return _offer()


@hookimpl
def dispatch_mul() -> Sequence[Kernel]:
    return _offer()


@hookimpl
def dispatch_silu() -> Sequence[Kernel]:
    return _offer()


@hookimpl
def dispatch_embed() -> Sequence[Kernel]:
    return _offer()


@hookimpl
def dispatch_convert() -> Sequence[Kernel]:
    return _offer()


@hookimpl
def dispatch_add_rms_norm() -> Sequence[Kernel]:
    return _offer()


@hookimpl
def dispatch_swiglu() -> Sequence[Kernel]:
    return _offer()


@hookimpl
def dispatch_qkv() -> Sequence[Kernel]:
    return _offer()


@hookimpl
def dispatch_gate_up_swiglu() -> Sequence[Kernel]:
    return _offer()


@hookimpl
def dispatch_mul_mat_add() -> Sequence[Kernel]:
    return _offer()


@hookimpl
def dispatch_qkv_rope_copy() -> Sequence[Kernel]:
    return _offer()


def _offer() -> Sequence[Kernel]:
    # Imported here: loading a backend must not load torch.
    from kernelmux_reference.kernels import Float32, Float64

    return (Float32(), Float64())
