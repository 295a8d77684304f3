"""The smallest set of things whose exchange makes a fault go away, found in as few tries as may be.

Enters: things in order, and a question about any set of them. Leaves: those to blame. Nothing here knows of models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def shortest_prefix(things: Sequence[T], holds: Callable[[Sequence[T]], bool], beside: Sequence[T] = ()) -> int:
    """How many of the first things it takes, beside others, until `holds`: log2 tries.

    It is false of the others alone, and true with all things.
    """
    fails, works = 0, len(things)
    while works - fails > 1:
        middle = (fails + works) // 2
        if holds([*beside, *things[:middle]]):
            works = middle
        else:
            fails = middle
    return works


def to_blame(
    things: Sequence[T],
    heals: Callable[[Sequence[T]], bool],
    proves: Callable[[Sequence[T]], bool],
    signs: Callable[[], Sequence[T]] = tuple,
) -> list[T] | None:
    """A set whose exchange `heals`, of which none can be left out where exchanging more never harms.

    `heals` is false of none; `proves` asks the same of what seems to be all, in a way that counts. For one thing to
    blame it takes log2 tries and a proof. Where one is not all, `signs` is asked once for those that something else
    speaks against: they are all where that is proved. None where even all things heal nothing: something else is to
    blame.
    """
    found: list[T] = []
    left = list(things)
    while left:
        count = shortest_prefix(left, heals, found)
        found, left = [*found, left[count - 1]], left[: count - 1]
        if proves(found):
            return found
        if len(found) == 1:
            seen = signs()
            several = [thing for thing in things if thing in found or thing in seen]
            if len(several) > 1 and proves(several):
                return several
    return None


def accomplices(things: Sequence[T], blamed: Sequence[T], fails: Callable[[Sequence[T]], bool]) -> list[T]:
    """What must be there beside those to blame for the fault to show: `fails` asks whether it does with just a set.

    Empty where they fail alone, and where they do not even with all the others.
    """
    kept = list(blamed)
    others = [thing for thing in things if thing not in kept]
    while not fails(kept):
        if not others:
            return []
        count = shortest_prefix(others, fails, kept)
        kept, others = [*kept, others[count - 1]], others[: count - 1]
    return kept[len(blamed) :]
