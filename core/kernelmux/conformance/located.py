"""Where the wrong elements of an output sit, in words: a person sees from the place what kind of mistake it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from kernelmux.conformance.guarded import bits

FEW = 4
"""Rows or columns that are listed one by one."""
NARROWER = 0.75
"""Of all rows or columns, the share up to which a range says something though some in it are right."""


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
        (rows, many_rows), (named, many_columns) = _span("row", in_rows, len(table)), self._columns(in_columns, columns)
        places = [rows, named]
        where = f"all in {' and '.join(filter(None, places))}" if any(places) else "everywhere"
        there = many_rows * many_columns
        share = f"{100 * count / there:.3g}"
        some = f", {share} % of those there" if any(places) and share != "100" else ""
        return f"{100 * count / table.numel():.3g} % of its elements are wrong, {where}{some}"

    def differing(self, found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> str:
        """`y[3, 511] = 1.25, expected 0.98 of [5, 512]; ..`: the first plane that differs, each element by its bits."""
        for plane, (new, old) in enumerate(zip(found, wanted, strict=True)):
            wrong = (bits(new) != bits(old)).view(new.shape)
            if bool(wrong.any()):
                named = self._plane(plane)
                return f"{named.element(first_index(wrong), new.double(), old.double())}; {named.located(wrong)}"
        return ""

    def unwritten(self, left: torch.Tensor, truth: torch.Tensor | None, plane: int = 0) -> str:
        """`y[3, 511] is left as it was, expected 0.98 of [5, 512]; ..`, of a mask of plane `plane`, not all False."""
        named, place = self._plane(plane), first_index(left)
        expected = "" if truth is None else f", expected {truth[*place]:.6g}"
        where = named.located(left).replace("are wrong", "are").replace("it alone is wrong", "it alone is")
        return f"{named.name}{list(place)} is left as it was{expected} of {list(left.shape)}; {where}"

    def _plane(self, plane: int) -> Layout:
        """The same for plane `plane` of the output's format, whose columns are others."""
        return self if plane == 0 else Layout(f"{('', 'the scales', 'the sums')[min(plane, 2)]} of {self.name}")

    def _columns(self, found: Sequence[int], extent: int) -> tuple[str, int]:
        """Where the columns are, by what an op or format does to several at once if that is all of it; as `_span`."""
        for what, size in (("head", self.head_dim), ("block", self.block)):
            if len(found) == 1 or not 1 < size < extent:
                continue
            # Of one of them some columns count as well; of several all that these have.
            touched = sorted({column // size for column in found})
            of = f" of {-(-extent // size)}" + (f", each of {size} columns" if what == "block" else "")
            many = sum(min(size, extent - each * size) for each in touched)
            if len(touched) == 1:
                last = what == "block" and touched[0] == (extent - 1) // size
                return f"the last block of {size} columns" if last else f"{what} {touched[0]}{of}", many
            if len(found) == many and (named := _span(what, touched, -(-extent // size))[0]):
                return f"{named}{of}", many
        return _span("column", found, extent)


PLAIN = Layout()
"""An output without a name of its own, of heads or of blocks."""


def _span(what: str, found: Sequence[int], extent: int) -> tuple[str, int]:
    """`rows from 3 on`, and how many those are; an empty name, and all, where the places have no order.

    Few that are right between many that are not, as zeros are that should be small, make no difference.
    """
    first, last = found[0], found[-1]
    across, end = last - first + 1, last == extent - 1
    if len(found) == extent:
        return "", extent
    if len(found) == 1:
        return f"the last {what}" if end else f"{what} {first}", 1
    if len(found) < across and len(found) <= FEW:
        return f"{what}s {', '.join(map(str, found))}", len(found)
    if len(found) < across and len({later - earlier for earlier, later in pairwise(found)}) == 1:
        return f"{what}s {first}, {found[1]} .. {last}", len(found)
    if len(found) == across or across <= NARROWER * extent:
        return f"{what}s from {first} on" if end else f"{what}s {first}..{last}", across
    return "", extent


def first_index(mask: torch.Tensor) -> tuple[int, ...]:
    """The first place where `mask` holds."""
    return tuple(int(i) for i in mask.nonzero()[0])
