"""convert: offers."""

from __future__ import annotations

from kernelmux.hookspecs import Answer


def offer(source: str, target: str) -> Answer:
    return []
