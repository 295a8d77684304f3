"""attention: which kernels take a node, the better one for so many rows first."""

from __future__ import annotations

from kernelmux.contract.device import Device
from kernelmux.contract.hookspecs import Declined, Kernel
from kernelmux.graph.graph import TensorNode
from kernelmux_triton import decode
from kernelmux_triton.attention_cache import CACHES, WIDEST
from kernelmux_triton.decode import Decode
from kernelmux_triton.launch import multiprocessors
from kernelmux_triton.prefill import Prefill, tunings_for

FEW = 64
"""Rows up to which reading the cache is most of the work."""


def offer(node: TensorNode, m: int, device: Device) -> list[Kernel | Declined]:
    """The kernels, or why not."""
    k_format, v_format = node.inputs[1].format, node.inputs[2].format
    if k_format not in CACHES or v_format != k_format:
        reason = f"it reads keys and values of one format of {', '.join(CACHES)}, not {k_format}, {v_format}"
        return [Declined(reason, "format")]
    if k_format == "fp8_row" and node.head_dim % 2:
        return [Declined(f"it reads e4m3 in pairs, and heads of {node.head_dim} have an odd one", "alignment")]
    if node.head_dim > WIDEST:
        return [Declined(f"it takes heads of up to {WIDEST}, not {node.head_dim}", "shape")]
    answers: list[Kernel | Declined] = [_decode(node, m, device), Prefill(k_format, tunings_for(device.capability))]
    return answers if m <= FEW else answers[::-1]


def _decode(node: TensorNode, m: int, device: Device) -> Kernel | Declined:
    if m > decode.ROWS:
        reason = f"each program counts all rows: up to {decode.ROWS}, not {m}; prefill takes any number"
        return Declined(reason, "shape", Decode.name)
    group = node.num_heads // node.num_kv_heads
    if group > decode.GROUP:
        reason = f"one program takes a kv head's queries: up to {decode.GROUP} heads, not {group}; prefill takes any"
        return Declined(reason, "shape", Decode.name)
    return Decode(node.inputs[1].format, multiprocessors(device))
