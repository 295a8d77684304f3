"""Model files in, graphs out.

Enters: a path, or the name of a random model. Leaves: the graph, the stored weights (read when they are packed), the
tokenizer and the chat template. Computes nothing. What architectures are made of is in blocks.py; each is a file in
architectures/.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from kernelmux.errors import KernelmuxError, ModelError, shown, where_raised
from kernelmux.graph.graph import Graph
from kernelmux.models.architectures import find_architecture
from kernelmux.models.blocks import Blocks
from kernelmux.models.folder import read_folder
from kernelmux.models.gguf import ModelFile, read
from kernelmux.models.random import RandomWeights, random_file
from kernelmux.models.shape import Shape
from kernelmux.models.tokenizer import SpelledIds, Tokenizer
from kernelmux.models.tokenizer_json import TOKENIZER, stated_ends


@dataclass(frozen=True, eq=False)
class Source:
    """What a model file holds: a graph with its sizes, and the file's weights and metadata."""

    file: ModelFile
    graph: Graph
    shape: Shape

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's own tokenizer; ModelError where it has none that is known."""
        if self.file.path.is_dir():
            return Tokenizer.from_folder(self.file.path, self.shape.vocab)
        return Tokenizer.from_metadata(self.file.metadata, str(self.file.path))

    @property
    def decoder(self) -> Tokenizer | SpelledIds:
        """What makes text of ids: the tokenizer, or where a folder has none the ids themselves."""
        path = self.file.path
        if path.is_dir() and not (path / TOKENIZER).exists():
            return SpelledIds(frozenset(stated_ends(path, self.shape.vocab)))
        return self.tokenizer


def open_model(path: str | Path, context: int = 0) -> Source:
    """Reads a GGUF file, or a folder; ModelError says what is wrong with it, where, and what would work.

    `context` is as in `build_source`.
    """
    path = Path(path)
    return build_source(read_folder(path) if os.path.isdir(path) else read(path), context)


def open_random(asked: str, device: str = "cpu", context: int = 0, option: str = "--random") -> Source:
    """A model of random weights, as `llama-8b:Q4_K_M`, drawn on a torch device when they are packed.

    ModelError names the `option` that asked for it.
    """
    source = build_source(random_file(asked, option), context)
    return replace(source, file=replace(source.file, weights=RandomWeights(source.file.weights, device)))


def build_source(file: ModelFile, context: int = 0) -> Source:
    """The graph of what a file holds; ModelError where a key or a tensor is missing, or is not built in.

    `context` tokens are to be held, where a model differs for short and for long contexts: phi3 by its longrope.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise file.fault(f"general.architecture is {shown(architecture)}; the name of one is needed")
    try:
        made = find_architecture(architecture)
    except ModelError as error:
        raise file.fault(str(error)) from error
    blocks = Blocks(file, architecture, context)
    try:
        graph = made.build(blocks)
    except KernelmuxError:
        raise
    except Exception as error:  # whatever a distribution's builder raises
        said = f"{type(error).__name__} at {where_raised(error)}: {error}"
        raise file.fault(f"architecture {shown(architecture)}: {said}") from error
    return Source(blocks.finish(), graph, blocks.shape)
