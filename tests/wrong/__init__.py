"""Deliberately wrong kernels, for the conformance suite's test of itself: one module a family of ops.

Each is a right kernel with one mistake, its class named after it, and says which check must catch it.
"""

from wrong import (
    asking,
    attention,
    cache,
    captured,
    elementwise,
    experts,
    keeps,
    launches,
    limits,
    linear,
    memory,
    norm,
    rope,
    weights,
)
from wrong.kernel import PLANTED, Planted, Right

__all__ = [
    "PLANTED",
    "Planted",
    "Right",
    "asking",
    "attention",
    "cache",
    "captured",
    "elementwise",
    "experts",
    "keeps",
    "launches",
    "limits",
    "linear",
    "memory",
    "norm",
    "rope",
    "weights",
]
