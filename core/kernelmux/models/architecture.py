"""What an architecture is: a function that builds its graph, and how folders of Hugging Face's say what GGUF says.

Enters: an author's tables. Leaves: an Architecture, which core lists and a distribution brings by an entry point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kernelmux.graph.graph import Graph
from kernelmux.models.blocks import Blocks


@dataclass(frozen=True)
class Folder:
    """How a folder of a model type differs from what all have in common (config.py, names.py)."""

    keys: Mapping[str, str] = field(default_factory=dict)
    """Of config.json, which keys stand for which of the architecture's in GGUF."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What holds where config.json does not say, by the architecture's keys in GGUF."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Within a layer, which modules, or parameters that are no module's weight or bias, are which tensors of GGUF."""
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Within a layer, which parameters [experts, inputs, outputs] are of which tensors of GGUF the outputs in turn.

    A parameter [experts, outputs] of that name and `_bias` holds their biases."""
    in_turn: bool = True
    """Whether outputs of several such tensors alternate; else those of the one come after all of the other's."""
    activation: str = "silu"
    """The only one that is built in, as config.json calls it."""
    theta: float = 10_000.0
    """The base of the rotary embedding's frequencies where config.json does not say."""
    tied: bool = False
    """Whether the head is the table of embeddings where config.json does not say."""
    pairing: Literal["adjacent", "halves"] = "halves"
    """Which elements of a head turn together."""
    within: str = ""
    """The key of config.json under which all that is read stands, where the model has other parts, as for images."""
    prefix: str = ""
    """How names of its tensors begin then; tensors of other names are not read."""
    own_head: bool = False
    """Whether GGUF has a head of its own even where it is the table of embeddings."""
    norms_from_zero: bool = False
    """Whether norms multiply by one more than is stored; GGUF stores what they multiply by."""


@dataclass(frozen=True)
class Architecture:
    """One name of `general.architecture`."""

    build: Callable[[Blocks], Graph]
    folders: Mapping[str, Folder] = field(default_factory=dict)
    """By the `model_type` of config.json."""
