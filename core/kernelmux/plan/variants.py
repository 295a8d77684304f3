"""Which variants of its kernel a choice takes, by row counts.

Enters: a choice with its node, a range of rows. Leaves: what is taken, and where that is known from.
"""

from __future__ import annotations

from collections.abc import Iterator

from kernelmux.graph.graph import TensorNode
from kernelmux.measure.table import Tables
from kernelmux.plan.choice import Choice, Taken


def taken_variants(tables: Tables, choice: Choice, node: TensorNode, low: int, high: int) -> tuple[Taken, ...]:
    """What a choice takes for a node of `low` to `high` rows; nothing where its kernel has no variants."""
    found: list[Taken] = []
    for rows in _row_classes(low, high):
        if (picked := tables.pick(choice.kernel, node.at(rows))) is None:
            continue
        variant, source = str(picked[0]), picked[1]
        if found and (found[-1].variant, found[-1].source) == (variant, source):
            found.pop()
        found.append(Taken(rows, variant, source))
    return tuple(found)


def _row_classes(low: int, high: int) -> Iterator[int]:
    """Powers of two that cover `low` to `high`, the last one cut off there."""
    rows = 1 << (low - 1).bit_length()
    while rows < high:
        yield rows
        rows *= 2
    yield high
