"""Experts as some folders hold them, all of a layer in one parameter, and as GGUF has them.

Enters: a weight [experts, inputs, outputs], or their biases [experts, outputs], whose outputs are those of one or of
several products in turn, as gate and up. Leaves: a weight [experts, outputs, inputs] of each product, an expert of
which is transposed when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kernelmux.errors import ModelError, shown
from kernelmux.graph.formats import Weight
from kernelmux.models.stored import StoredPlane, StoredWeight, made_plane, stacked_weight

if TYPE_CHECKING:
    import torch


def outputs_in_turn(path: Path, name: str, weight: Weight, products: Sequence[str]) -> Mapping[str, Weight]:
    """The weights of these products; ModelError where the outputs do not divide over them."""
    (stored,) = weight.stored if isinstance(weight, StoredWeight) else (None,)
    is_bias, turns = products[0].endswith(".bias"), len(products)
    if not isinstance(stored, StoredPlane) or len(stored.shape) != 3 - is_bias or stored.shape[-1] % turns:
        wanted = "[experts, outputs]" if is_bias else "[experts, inputs, outputs]"
        told = f"tensor {shown(name)} is {weight.shape}, not {wanted} of {turns} products in turn"
        raise ModelError(f"{path}: {told}", file=str(path))
    return {
        product: _biases(product, weight.format, stored, slice(number, None, turns))
        if is_bias
        else _matrices(product, weight.format, stored, slice(number, None, turns))
        for number, product in enumerate(products)
    }


def _biases(name: str, format: str, stored: StoredPlane, taken: slice) -> Weight:
    own = stored.tensor()[:, taken].contiguous()
    return Weight(name, tuple(own.shape), format, (own,))


def _matrices(name: str, format: str, stored: StoredPlane, taken: slice) -> StoredWeight:
    count, inputs, outputs = stored.shape
    shape = (len(range(outputs)[taken]), inputs)
    experts = []
    for expert in range(count):
        plane = made_plane(stored.dtype, shape, partial(_transposed, stored.rows(slice(expert, expert + 1)), taken))
        experts.append(StoredWeight(name, shape, format, (plane,)))
    return stacked_weight(name, experts)


def _transposed(expert: StoredPlane, taken: slice) -> torch.Tensor:
    """Of one expert [1, inputs, outputs] the outputs that are taken, [outputs, inputs]."""
    return expert.tensor()[0, :, taken].mT
