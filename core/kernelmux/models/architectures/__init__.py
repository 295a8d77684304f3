"""The architectures: each a function from Blocks to a Graph, by the name that `general.architecture` has for it.

A distribution brings one through the entry point group `kernelmux.architectures`: its name, and such a function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points

from kernelmux.errors import ModelError, nearest, shown, where_raised
from kernelmux.graph.graph import Graph
from kernelmux.models.architectures import llama, qwen
from kernelmux.models.blocks import Blocks

GROUP = "kernelmux.architectures"

Build = Callable[[Blocks], Graph]

ARCHITECTURES: Mapping[str, Build] = {
    "llama": llama.build,
    "qwen2": qwen.build_qwen2,
}
"""Core's."""


def find_architecture(name: str) -> Build:
    """The builder of that name, core's or an installed distribution's; ModelError where there is none that works."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    brought = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in brought:
        raise ModelError(f"unknown architecture {shown(name)}{nearest(name, {*ARCHITECTURES, *brought})}")
    entry = brought[name]
    whose = entry.dist.name if entry.dist else entry.value
    try:
        build: Build = entry.load()
    except Exception as error:  # whatever the distribution's module raises
        said = f"{type(error).__name__} at {where_raised(error)}: {error}"
        raise ModelError(f"architecture {shown(name)} of {whose} cannot be loaded: {said}") from error
    return build
