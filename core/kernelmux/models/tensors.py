"""The tensors of a model file, each of which the graph uses, or which is refused.

Enters: a ModelFile. Leaves: weights of checked shapes and formats, and parts of stored tensors under names of their
own; ModelError names a tensor that is missing, of another shape, or that nobody has asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from kernelmux.errors import label, shown
from kernelmux.graph.formats import Weight, lookup
from kernelmux.models.gguf import ModelFile
from kernelmux.models.stored import flattened, rows_of

VECTORS = ("f32", "f16", "bf16")
"""How norms, biases and divisors may be stored."""
NO_WEIGHTS = ("i32", "f64")
"""Formats in which no kernel reads a matrix."""


class Tensors:
    """The stored tensors by name, and which of them have been used."""

    def __init__(self, file: ModelFile, architecture: str, layers: int) -> None:
        self._file = file
        self._architecture = architecture
        self._layers = layers
        self._parts: dict[str, Weight] = {}
        self._used: set[str] = set()
        self._divided: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._parts or name in self._file.weights

    def take(self, name: str, *shape: int) -> Weight:
        """The tensor of that name, which must exist with this shape, in a format of its kind."""
        weight = self._parts.get(name) or self._file.weights.get(name)
        if weight is None:
            raise self._file.fault(f"tensor {name!r} is missing; a {self._architecture} model needs it")
        if weight.shape != shape:
            raise self._file.fault(f"tensor {name!r} is {weight.shape}, the metadata asks for {shape}")
        fits = weight.format in VECTORS if len(shape) == 1 else weight.format not in NO_WEIGHTS
        if not fits:
            needed = ", ".join(VECTORS) if len(shape) == 1 else "floats or blocks of them"
            raise self._file.fault(f"tensor {name!r} is stored as {weight.format}; {needed} are read")
        self._used.add(name)
        return weight

    def take_stacked(self, name: str, count: int, *shape: int) -> Weight:
        """Of a tensor of so many matrices, or vectors, one of all their rows, which is the tensor from now on."""
        whole = self._parts.get(name) or flattened(self.take(name, count, *shape))
        self._parts[name] = whole
        return whole

    def make_ones(self, name: str, count: int) -> None:
        """From now on there is a vector of so many ones, which no file stores."""
        import torch

        self._parts[name] = Weight(name, (count,), "f32", (torch.ones(count),))

    def split(self, name: str, columns: int, parts: Mapping[str, int]) -> None:
        """From now on the rows of a stored matrix are tensors of their own, so many of each name in turn."""
        whole = self.take(name, sum(parts.values()), columns)
        first = 0
        for part, rows in parts.items():
            if any(plane.rows > 1 and first % plane.rows for plane in lookup(whole.format).planes):
                raise self._file.fault(f"tensor {name!r}: its blocks of {whole.format} reach over {part!r}")
            self._parts[part] = rows_of(whole, part, slice(first, first + rows))
            first += rows
        self._divided.add(name)

    def finish(self) -> ModelFile:
        """The file with parts in place of what they are of; ModelError at the first tensor that nobody uses."""
        for name in self._file.weights:
            if name not in self._used:
                raise self._file.fault(f"tensor {shown(name)}: {self._why_unused(name)}")
        if not self._parts:
            return self._file
        whole = {name: weight for name, weight in self._file.weights.items() if name not in self._divided}
        return replace(self._file, weights=whole | self._parts)

    def _why_unused(self, name: str) -> str:
        layer = re.match(r"blk\.(\d{1,9})\.", name)
        if layer and int(layer[1]) >= self._layers:
            return f"the metadata states {self._layers} layers, blk.0 to blk.{self._layers - 1}"
        return f"{label(self._architecture)} models are not built with it; it would be ignored"
