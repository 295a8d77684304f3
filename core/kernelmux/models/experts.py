"""Experts of a layer that are stored one tensor each, as one weight of all.

Enters: weights by name, and a function that tells an expert's by its name. Leaves: the weights, those of experts
stacked in their order under the name of the whole; ModelError where one is missing, differs, or is there twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from kernelmux.errors import ModelError, shown
from kernelmux.graph.formats import lookup
from kernelmux.models.quantized_weights import with_scales_of_rows
from kernelmux.models.stored import StoredWeight, stacked_weight

OfExpert = Callable[[str], tuple[str, int] | None]
"""From an expert's tensor to the name of that of all, and which of them it is; None of any other tensor."""


def experts_stacked(path: Path, weights: Mapping[str, StoredWeight], of_expert: OfExpert) -> dict[str, StoredWeight]:
    """The weights of a file or folder, where experts are no tensors of their own."""
    found: dict[str, StoredWeight] = {}
    experts: dict[str, dict[int, StoredWeight]] = {}
    for name, weight in weights.items():
        if (one := of_expert(name)) is None:
            found[name] = weight
            continue
        whole, number = one
        parts = experts.setdefault(whole, {})
        if whole in weights or number in parts:
            raise ModelError(f"{path}: two tensors are {whole}, one of them {shown(name)}", file=str(path))
        parts[number] = weight
    return found | {name: _stacked(path, name, parts) for name, parts in experts.items()}


def _stacked(path: Path, name: str, experts: Mapping[int, StoredWeight]) -> StoredWeight:
    """The experts' tensors as one, in their order."""
    found = [with_scales_of_rows(experts[number]) for number in range(len(experts)) if number in experts]
    if len(found) < len(experts) or len({(part.shape, part.format) for part in found}) > 1:
        told = f"{name}: {len(experts)} experts, numbered from 0 on and stored alike, are needed"
        raise ModelError(f"{path}: {told}; one is missing or differs", file=str(path))
    tall = max(plane.rows for plane in lookup(found[0].format).planes)
    if tall and found[0].shape[0] % tall:
        told = f"{name}: {tall} rows share scales, experts have {found[0].shape[0]}"
        raise ModelError(f"{path}: {told}; whole blocks are needed", file=str(path))
    return stacked_weight(name, found)
