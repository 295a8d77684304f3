"""Experts as some folders hold them, all of a layer in one parameter, and as GGUF has them.

Enters: a weight of numbers [experts, inputs, outputs] or of blocks [experts, outputs, inputs], or biases [experts,
outputs], whose outputs are those of one or of several products in turn, as gate and up. Leaves: a weight [experts,
outputs, inputs] of each product, which is taken apart when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kernelmux.errors import ModelError, shown
from kernelmux.graph.formats import Weight, lookup
from kernelmux.models.stored import StoredPlane, StoredWeight, made_plane

if TYPE_CHECKING:
    import torch


def taken_apart(
    path: Path, name: str, weight: Weight, products: Sequence[str], in_turn: bool = True
) -> Mapping[str, Weight]:
    """The weights of these products, whose outputs come in turn, or those of the one after all of the other's.

    ModelError where the outputs do not divide over them.
    """
    (stored,) = weight.stored if isinstance(weight, StoredWeight) else (None,)
    is_bias, turns = products[0].endswith(".bias"), len(products)
    whole = isinstance(stored, StoredPlane) and len(weight.shape) == 3 - is_bias
    if not isinstance(stored, StoredPlane) or not whole or weight.shape[_outputs(weight)] % turns:
        wanted = "[experts, outputs]" if is_bias else "three axes"
        told = f"tensor {shown(name)} is {weight.shape}, not {wanted} of {turns} products in turn"
        raise ModelError(f"{path}: {told}", file=str(path))
    make, each = _biases if is_bias else _matrices, weight.shape[_outputs(weight)] // turns
    taken = [slice(n, None, turns) if in_turn else slice(n * each, (n + 1) * each) for n in range(turns)]
    return {product: make(product, weight, stored, taken[number]) for number, product in enumerate(products)}


def _outputs(weight: Weight) -> int:
    """The axis of the outputs."""
    return len(weight.shape) - (1 if lookup(weight.format).plain else 2)


def _biases(name: str, weight: Weight, stored: StoredPlane, taken: slice) -> Weight:
    own = stored.tensor()[:, taken].contiguous()
    return Weight(name, tuple(own.shape), weight.format, (own,))


def _matrices(name: str, weight: Weight, stored: StoredPlane, taken: slice) -> StoredWeight:
    axis = _outputs(weight)
    shape = (weight.shape[0], len(range(weight.shape[axis])[taken]), weight.shape[3 - axis])
    (plane,), apart = lookup(weight.format).planes, _transposed if axis == 2 else _taken
    made = made_plane(stored.dtype, plane.shape(shape), (stored,), partial(apart, taken=taken))
    return StoredWeight(name, shape, weight.format, (made,))


def _transposed(experts: torch.Tensor, taken: slice) -> torch.Tensor:
    """Of numbers [experts, inputs, outputs] the outputs that are taken, [experts, outputs, inputs]."""
    return experts[:, :, taken].mT


def _taken(experts: torch.Tensor, taken: slice) -> torch.Tensor:
    """Of blocks [experts, outputs, bytes] those of the outputs that are taken."""
    return experts[:, taken]
