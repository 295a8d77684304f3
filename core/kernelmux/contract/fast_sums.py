"""How many FP8 products the tensor cores' own sums may add.

A Hopper's adds 32 products at a time to what it has, all cut to 13 bits below the largest of them: of many products of
one sign each loses what the sum has outgrown. Emulated so, sums of 4032 equal activations are a card's to six digits
(964.082 of 1058.91). Of products of one size 4.5e-3 is lost (NMSE) at 2048, 2.1e-2 at 4096, half at 28672. Sums
that are taken over by float32 each 128 columns lose next to nothing.
"""

from __future__ import annotations

from kernelmux.contract.kernel import Declined
from kernelmux.graph.graph import TensorNode

MOST = 2048
"""Products that an error bound of 7e-3, which holds what quantising loses too, allows."""


def too_long(node: TensorNode) -> Declined | None:
    """Why a kernel with such sums does not take a product of that many columns, if it does not."""
    k = node.weight[0].extents[1]
    if k <= MOST:
        return None
    reason = f"the tensor cores' own sums of more than {MOST} products can lose more than its bound: k is {k}"
    return Declined(reason, "shape")
