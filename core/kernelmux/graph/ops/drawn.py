"""Cases drawn from ops' domains.

Enters: an op, or a point of its domain. Leaves: cases, the same in every process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from kernelmux.graph.ops.domain import Domain, Point, covering, label

if TYPE_CHECKING:
    from kernelmux.graph.ops.cases import Case
    from kernelmux.graph.ops.op import Op

MARK = "drawn"
"""Of cases that nobody wrote by hand."""


def covering_cases(op: Op) -> Iterator[Case]:
    """The cases that cover the op's domain; none where it states none."""
    if domain := op.domain():
        for point in covering(domain):
            yield drawn_case(domain, point)


def drawn_case(domain: Domain, point: Point) -> Case:
    """The case of a point, named after it."""
    return replace(domain.case(f"drawn:{label(domain, point)}", point), marks=frozenset({MARK}))
