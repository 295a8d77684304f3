"""Stores a model's weights otherwise, in a GGUF file: one tensor after another, some rows at a time, on a device.

Enters: a ModelFile, what each tensor is to be stored as. Leaves: the file, whole or not at all, and what each tensor's
error is: NMSE, the sum of squared differences over the sum of squares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelmux.contract.device import Device
from kernelmux.contract.weights import dequantized_rows
from kernelmux.errors import ModelError
from kernelmux.files import replacing
from kernelmux.graph.dequantize import dequantize_blocks
from kernelmux.graph.formats import Value, Weight, lookup
from kernelmux.graph.quantize import quantize_blocks
from kernelmux.models.gguf import ModelFile
from kernelmux.models.stored import loaded
from kernelmux.models.targets import FILE_TYPES, Target
from kernelmux.models.writer import Writer

if TYPE_CHECKING:
    import torch

_OURS = ("general.file_type", "general.quantization_version")
QUANTIZATION_VERSION = 2
"""`general.quantization_version` of these layouts."""
IN_CACHE = 2**17
"""Elements that are quantised at once on a processor, so that all passes over them stay within its caches."""


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor that was written."""

    name: str
    shape: tuple[int, ...]
    was: str
    format: str
    reason: str
    bytes_before: int
    bytes: int
    error: float
    """NMSE against what the model had."""


def write_quantized(
    model: ModelFile, path: Path, format: str, targets: Sequence[Target], device: Device
) -> Iterator[QuantizedTensor]:
    """Writes the file while it is iterated over, and tells of each tensor; ModelError where one cannot be stored so.

    Metadata is as the model has it, but for what says how it is stored: `format` is what most tensors are. A folder's
    is what `exported` makes of it.
    """
    if model.pairing is not None:
        raise model.fault("queries and keys are not as GGUF has them; exported.py puts them so")
    metadata = {**model.metadata, "general.file_type": FILE_TYPES[format]}
    if any(not lookup(target.format).plain for target in targets):
        metadata["general.quantization_version"] = QUANTIZATION_VERSION
    table = [Value(target.weight.name, target.weight.shape, target.format) for target in targets]
    kinds = {key: kind for key, kind in model.kinds.items() if key not in _OURS}
    with replacing(path) as file:
        writer = Writer(file, metadata, kinds, table)
        for target in targets:
            error = TensorError()
            size = writer.tensor(_pieces(target, device, error))
            weight = target.weight
            if not error.finite:
                raise infinite(model.path, target)
            yield QuantizedTensor(
                *(weight.name, weight.shape, weight.format, target.format, target.reason),
                *(weight.nbytes, size, error.nmse),
            )


def infinite(path: Path, target: Target) -> ModelError:
    """What is wrong with a tensor's numbers."""
    said = f"has numbers that are infinite or NaN, or larger than {target.format} holds; store it as f32 (--rule)"
    return ModelError(f"{path}: tensor {target.weight.name!r} {said}", file=str(path))


class TensorError:
    """Sums over the pieces of a tensor."""

    def __init__(self) -> None:
        self._wrong, self._whole = 0.0, 0.0

    def add(self, values: torch.Tensor, stored: torch.Tensor) -> None:
        self._wrong += float((stored - values).double().square_().sum())
        self._whole += float(values.double().square_().sum())

    @property
    def finite(self) -> bool:
        return self._wrong + self._whole < float("inf")

    @property
    def nmse(self) -> float:
        return self._wrong / self._whole if self._whole else 0.0


def _pieces(target: Target, device: Device, error: TensorError) -> Iterator[memoryview]:
    """The bytes of a tensor as it is to be stored."""
    weight, format = loaded(target.weight), lookup(target.format)
    if weight.format == target.format:
        for plane in weight.planes:
            yield _bytes(plane)
        return
    for matrix in _matrices(weight):
        for _, values in dequantized_rows(matrix, device):
            if format.plain:
                made = values.to(format.dtype)
                error.add(values, made.float())
                yield _bytes(made)
                continue
            blocks = values.view(-1, format.block)
            if not bool(blocks.isfinite().all()):
                error.add(blocks, blocks)
                return
            size = IN_CACHE // format.block if device.platform.host_memory else len(blocks)
            for start in range(0, len(blocks), size):
                part = blocks[start : start + size]
                quantised = quantize_blocks(format.name, part)
                error.add(part, dequantize_blocks(format.name, quantised))
                yield _bytes(quantised)


def _matrices(weight: Weight) -> Iterator[Weight]:
    """A weight of any shape as matrices, in order."""
    if len(weight.shape) == 2:
        yield weight
    elif len(weight.shape) < 2:
        yield replace(weight, shape=(1, *weight.shape), planes=tuple(plane.view(1, -1) for plane in weight.planes))
    else:
        for number in range(weight.shape[0]):
            planes = tuple(plane[number] for plane in weight.planes)
            yield from _matrices(replace(weight, shape=weight.shape[1:], planes=planes))


def _bytes(plane: torch.Tensor) -> memoryview:
    import torch

    data: Any = plane.contiguous().view(-1).view(torch.uint8).cpu().numpy()
    return memoryview(data)
