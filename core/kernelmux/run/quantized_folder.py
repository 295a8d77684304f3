"""Stores a folder's matrices as FP8, in another folder: one tensor after another, on a device.

Enters: a StoredFolder, what each tensor is to be stored as. Leaves: the folder, whole or not at all, and what each
tensor's error is. What is read back is what was written: a folder that read_folder would refuse is not left.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kernelmux.contract.device import Device
from kernelmux.contract.weights import dense, row_ranges
from kernelmux.errors import ModelError
from kernelmux.files import new_folder
from kernelmux.graph.formats import Value, dequantize_planes, empty_planes, lookup, planes_of_rows, quantize_planes
from kernelmux.models import open_model
from kernelmux.models.folder import CONFIG, WHOLE, StoredFolder
from kernelmux.models.fp8_folder import BESIDE, config_of, tables
from kernelmux.models.safetensors import write_header, write_tensor
from kernelmux.models.stored import loaded
from kernelmux.models.targets import Target
from kernelmux.run.quantized import QuantizedTensor, TensorError, infinite

if TYPE_CHECKING:
    import torch


def write_folder(
    stored: StoredFolder, path: Path, format: str, targets: Sequence[Target], device: Device
) -> Iterator[QuantizedTensor]:
    """Writes the folder while it is iterated over, and tells of each tensor; ModelError where one cannot be stored so.

    `path` is none yet, or an empty folder.
    """
    with new_folder(path) as made:
        config = config_of(stored, format, targets)
        (made / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        for name in BESIDE:
            if (stored.path / name).is_file():
                shutil.copyfile(stored.path / name, made / name)
        with (made / WHOLE).open("xb") as file:
            write_header(tables(targets), file)
            for target in targets:
                error, size = TensorError(), 0
                for plane in _planes(target, device, error):
                    write_tensor(plane, file)
                    size += plane.nbytes
                if not error.finite:
                    raise infinite(stored.path, target)
                weight = target.weight
                yield QuantizedTensor(
                    *(weight.name, weight.shape, weight.format, target.format, target.reason),
                    *(weight.nbytes, size, error.nmse),
                )
        _check(made, stored, format)


def _check(made: Path, stored: StoredFolder, format: str) -> None:
    """ModelError where the folder is none that is read, as where a matrix that models take apart has blocks across."""
    try:
        open_model(made)
    except ModelError as error:
        said = str(error).removeprefix(f"{made}: ")
        told = f"as {format} it would not be read again: {said}; leave that one as it is (--rule '*NAME*=bf16')"
        raise ModelError(f"{stored.path}: {told}", file=str(stored.path)) from error


def _planes(target: Target, device: Device, error: TensorError) -> tuple[torch.Tensor, ...]:
    """The tensors of a weight as it is to be stored."""
    import torch

    weight, format = loaded(target.weight), lookup(target.format)
    if weight.format == format.name:
        return weight.planes
    values = dense(weight, torch.float32, device)
    planes = empty_planes(Value(weight.name, weight.shape, format.name), device.torch)
    quantize_planes(format.name, values, planes)
    if len(weight.shape) != 2:
        error.add(values, planes[0].float())
        return planes
    for rows in row_ranges(*weight.shape):
        error.add(values[rows], dequantize_planes(format.name, planes_of_rows(format.name, planes, rows)))
    return planes
