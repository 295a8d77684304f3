"""Where the wrong elements of an output sit, in words: a person sees from the place what kind of mistake it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

FEW = 4
"""Rows or columns that are listed one by one."""


@dataclass(frozen=True)
class Layout:
    """How messages call an output, and how many of its columns are one head, and one block of a format."""

    name: str = "y"
    head_dim: int = 0
    block: int = 1

    def element(self, index: Sequence[int], found: torch.Tensor, wanted: torch.Tensor) -> str:
        """`y[3, 511] = 1.25, expected 0.98 of [5, 512]`."""
        place, shape = list(index), list(wanted.shape)
        return f"{self.name}{place} = {found[*index]:.6g}, expected {wanted[*index]:.6g} of {shape}"

    def located(self, wrong: torch.Tensor) -> str:
        """`12 % of its elements are wrong, all in the last column`; `wrong` is a mask, not all False.

        Of more than two extents the last two are columns, as a cache's heads.
        """
        columns = math.prod(wrong.shape[-2:] if wrong.dim() > 2 else wrong.shape[-1:])
        table = wrong.reshape(-1, columns)
        count = int(table.sum())
        if count == 1:
            return "it alone is wrong"
        in_rows, in_columns = (table.any(dim=other).nonzero().flatten().tolist() for other in (1, 0))
        places = [_span("row", in_rows, len(table)), self._columns(in_columns, columns)]
        where = f"all in {' and '.join(filter(None, places))}" if any(places) else "everywhere"
        return f"{100 * count / table.numel():.3g} % of its elements are wrong, {where}"

    def _columns(self, found: Sequence[int], extent: int) -> str:
        """Where the columns are, by what an op or format does to several at once if that is all of it."""
        if len(found) > 1 and 0 < self.head_dim < extent and found[0] // self.head_dim == found[-1] // self.head_dim:
            return f"head {found[0] // self.head_dim} of {extent // self.head_dim}"
        if len(found) > 1 and 1 < self.block < extent and found[0] >= (extent - 1) // self.block * self.block:
            return f"the last block of {self.block} columns"
        return _span("column", found, extent)


PLAIN = Layout()
"""An output without a name of its own, of heads or of blocks."""


def _span(what: str, found: Sequence[int], extent: int) -> str:
    """`rows from 3 on`; empty where the places are all that there are, or have no order."""
    first, last = found[0], found[-1]
    if len(found) == extent:
        return ""
    if len(found) == 1:
        return f"the last {what}" if last == extent - 1 else f"{what} {first}"
    if len(found) == last - first + 1:
        return f"{what}s from {first} on" if last == extent - 1 else f"{what}s {first}..{last}"
    return f"{what}s {', '.join(map(str, found))}" if len(found) <= FEW else ""
