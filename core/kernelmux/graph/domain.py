"""Ranges and sets of values: what a kernel takes of an op's arguments, and what a policy's rule asks of them.

Enters: `5`, `"1..16"`, `"f32"`, a list of these. Leaves: whether a value is among them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """Whole numbers from `low` to `high`, both included; an open end has None."""

    low: int = 0
    high: int | None = None

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and self.low <= number and (self.high is None or number <= self.high)

    def __str__(self) -> str:
        if self.low == self.high:
            return str(self.low)
        return f"{self.low or ''}..{'' if self.high is None else self.high}"

    def covers(self, other: Range) -> bool:
        """Whether every number of `other` is in this range."""
        return self.low <= other.low and (self.high is None or (other.high is not None and other.high <= self.high))


def parse_range(value: Any) -> Range:
    """`5`, `"5"`, `"1..16"`, `"17.."` or `"..16"`; ValueError for what is none of these."""
    if isinstance(value, Range):
        return value
    match = re.fullmatch(r"(\d*)(\.\.)?(\d*)", str(value)) if isinstance(value, int | str) else None
    if match is None or isinstance(value, bool) or not (match[1] or match[3]) or len(str(value)) > 40:
        raise ValueError(f"{value!r:.40} is no range: write 5, '1..16', '17..' or '..16'")
    low = int(match[1] or 0)
    high = low if not match[2] else int(match[3]) if match[3] else None
    if high is not None and high < low:
        raise ValueError(f"{value!r} is empty: its end is below its start")
    return Range(low, high)


def admits(allowed: object, value: object) -> bool:
    """Whether a value is allowed: equal to one of those named, or within a range; of several values, all are."""
    if isinstance(value, tuple):
        return all(admits(allowed, part) for part in value)
    if isinstance(allowed, str) and ".." in allowed:
        allowed = parse_range(allowed)
    if isinstance(allowed, Range):
        # What is not known yet may still turn out right.
        return isinstance(value, str) or value in allowed
    return value in (allowed if isinstance(allowed, Sequence) and not isinstance(allowed, str) else (allowed,))


def in_words(allowed: object) -> str:
    """`Q4_0 and Q4_1`, `..64`: what is allowed, or what there is, for a message."""
    if isinstance(allowed, Sequence) and not isinstance(allowed, str):
        *first, last = (str(one) for one in dict.fromkeys(allowed))
        return f"{', '.join(first)} and {last}" if first else last
    return str(allowed)
