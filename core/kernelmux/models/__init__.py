"""Model files in, graphs out.

Enters: a path, or the name of a random model. Leaves: the graph, the stored weights (read when they are packed), the
tokenizer and the chat template. Computes nothing. To add an architecture, write
its `build` and name it in ARCHITECTURES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from kernelmux.errors import nearest, shown
from kernelmux.graph.graph import Graph
from kernelmux.models import llama
from kernelmux.models.gguf import ModelFile, read
from kernelmux.models.llama import Shape
from kernelmux.models.random import RandomWeights, random_file
from kernelmux.models.tokenizer import Tokenizer

ARCHITECTURES: Mapping[str, Callable[[ModelFile], tuple[Graph, Shape]]] = {"llama": llama.build}


@dataclass(frozen=True, eq=False)
class Source:
    """What a model file holds: a graph with its sizes, and the file's weights and metadata."""

    file: ModelFile
    graph: Graph
    shape: Shape

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's own tokenizer; ModelError where it has none that is known."""
        return Tokenizer.from_metadata(self.file.metadata, str(self.file.path))


def open_model(path: str | Path) -> Source:
    """Reads a GGUF file; ModelError says what is wrong with it, where, and what would work."""
    return _build(read(Path(path)))


def open_random(asked: str, device: str = "cpu") -> Source:
    """A model of random weights, as `llama-8b:Q4_K_M`, drawn on a torch device when they are packed."""
    source = _build(random_file(asked))
    return replace(source, file=replace(source.file, weights=RandomWeights(source.file.weights, device)))


def _build(file: ModelFile) -> Source:
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        known = nearest(str(architecture), ARCHITECTURES)
        raise file.fault(f"unknown architecture {shown(architecture)}{known}")
    graph, shape = ARCHITECTURES[architecture](file)
    return Source(file, graph, shape)
