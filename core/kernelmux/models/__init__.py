"""Model files in, graphs out.

Enters: a path. Leaves: the graph, the stored weights (memory-mapped), the tokenizer and the chat template. Computes
nothing. To add an architecture, write its `build` and name it in ARCHITECTURES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kernelmux.errors import ModelError, nearest
from kernelmux.graph import Graph
from kernelmux.models import llama
from kernelmux.models.gguf import ModelFile, read
from kernelmux.models.llama import Shape
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
    file = read(Path(path))
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ModelError(f"{path}: unknown architecture {architecture!r}{nearest(str(architecture), ARCHITECTURES)}")
    graph, shape = ARCHITECTURES[architecture](file)
    return Source(file, graph, shape)
