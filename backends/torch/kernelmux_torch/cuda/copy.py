"""copy on CUDA, without a look at the slots: a graph can hold it."""

from __future__ import annotations

import torch

from kernelmux.contract import Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_torch import copy


class Copy(copy.Copy):
    """A padding row writes once more what some other row writes; where all are, a cell gets what it holds."""

    devices = ("cuda", "rocm")
    capturable = True
    on_card = 20

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        k, v, slots, *caches = tensors.inputs
        pairs = [(cache.view(-1, rows.shape[1]), rows) for cache, rows in zip(caches, (k, v), strict=True)]
        rows = torch.arange(len(slots), device=slots.device)

        def launch() -> None:
            kept = slots >= 0
            sources = rows.where(kept, kept.int().argmax())
            where = slots[sources].long().clamp_(min=0)
            for cells, given in pairs:
                cells[where] = given[sources].to(cells.dtype).where(kept.any(), cells[where])

        return launch
