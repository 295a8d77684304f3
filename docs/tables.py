"""Markdown that several sections of docs/performance.md have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def head(cells: Sequence[str]) -> Iterator[str]:
    """A table's first lines."""
    yield line(cells)
    yield "|" + "---|" * len(cells)


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def provenance(result: Mapping[str, Any]) -> list[str]:
    """What a result was measured with, and the notes beside it."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    measured = f"{versions}; commit {result['commit']}, {result['date']}."
    return [measured, *(f"\n{note}" for note in result.get("notes", [])), ""]
