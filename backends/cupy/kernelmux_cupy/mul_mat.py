"""mul_mat and what is fused with it: offers."""

from __future__ import annotations

from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Answer


def offer(node: TensorNode, m: int) -> Answer:
    return []


def offer_add(node: TensorNode, m: int) -> Answer:
    return []


def offer_qkv(node: TensorNode, m: int) -> Answer:
    return []


def offer_gate_up_swiglu(node: TensorNode, m: int) -> Answer:
    return []
