"""The formats that kernels read and write, by the names that the sources have for them too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kernelmux.graph.formats import Value, as_tuple, lookup

FLOATS = ("f32", "bf16", "f16")
QUANTIZED = "q8_32"


def formats(values: Sequence[Value]) -> list[str]:
    """The formats of a node's values."""
    return [value.format for value in values]


def emitted(value: Value) -> Sequence[str]:
    """The formats in which an output can be written: q8_32 where its blocks fit the rows."""
    columns = value.shape[-1]
    fits = isinstance(columns, int) and lookup(QUANTIZED).check((columns,)) is None
    return (*FLOATS, QUANTIZED) if fits else FLOATS


def written(planes: Any) -> tuple[Any, Any, Any]:
    """The arguments for a tensor that is written: data, scales and sums, null for a format without."""
    data, *scales = as_tuple(planes)
    return (data, *scales) if scales else (data, None, None)
