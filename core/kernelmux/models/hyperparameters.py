"""The keys of a model file under its architecture's prefix, each of which is read, known not to matter, or refused.

Enters: a ModelFile. Leaves: checked numbers by key; ModelError names a key that is missing, of the wrong type or range,
or that nobody has read: a model that asks for what is not built in would answer wrongly.
Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from kernelmux.errors import nearest, shown
from kernelmux.models.gguf import ModelFile

INERT: Mapping[str, str] = {
    "rope.scaling.finetuned": "how the model was trained",
    "tensor_data_layout": "how a converter found the tensors",
    "attention.layer_norm_epsilon": "of another kind of norm, which these models have not",
}
"""Keys that no architecture here computes with, and what they tell."""

ABSENT: Mapping[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "nextn_predict_layers": 0,
    "pooling_type": 0,
    "use_parallel_residual": False,
}
"""What a key must say where an architecture does not read it: that the model has no such thing."""

LARGEST = 2**31 - 1


class Hyperparameters:
    """The keys of one file by their names without the prefix, and which of them have been read."""

    def __init__(self, file: ModelFile, architecture: str) -> None:
        self.file = file
        self.architecture = architecture
        opening = f"{architecture}."
        self._values = {
            key.removeprefix(opening): value for key, value in file.metadata.items() if key.startswith(opening)
        }
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def fail(self, key: str, says: str) -> NoReturn:
        """ModelError about a key, which is named with its prefix and its value."""
        raise self.file.fault(f"{self.architecture}.{key} = {shown(self._values.get(key))}: {says}")

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """An integer from `least` on; without a default the file must state it."""
        return self._count(key, self._get(key, default), least)

    def count_of_layers(self, key: str, layers: int, default: int | None = None) -> int:
        """The same of a key that may state a value for each layer, where all are one: others are not built in."""
        value = self._get(key, default)
        if isinstance(value, list):
            if len(value) != layers:
                self.fail(key, f"{len(value)} values for {layers} layers")
            if any(self._count(key, each, 1) != value[0] for each in value):
                self.fail(key, "layers of different sizes are not built in")
            value = value[0]
        return self._count(key, value, 1)

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0, finite."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self.fail(key, "a positive number is needed")
        return float(value)

    def number_or_none(self, key: str, default: float = 0.0) -> float:
        """The same of a key that may be 0, or absent."""
        value = self._get(key, default)
        return 0.0 if value == 0 and not isinstance(value, bool) else self.number(key, default)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.fail(key, "true or false is needed")
        return value

    def truth(self, key: str, default: bool) -> bool:
        """The same of a key that may be a count, which is as good as true where it is not 0."""
        value = self._get(key, default)
        return bool(self._count(key, value, 0)) if type(value) is int else self.flag(key, default)

    def listed_layers(self, key: str, layers: int) -> list[bool]:
        """Which layers a key lists by their numbers."""
        value = self._get(key, None)
        if not isinstance(value, list) or any(type(each) is not int or not 0 <= each < layers for each in value):
            self.fail(key, f"a list of layers from 0 to {layers - 1} is needed")
        return [layer in value for layer in range(layers)]

    def flags_of_layers(self, key: str, layers: int, default: list[bool] | None = None) -> list[bool]:
        """One flag a layer; where there is a default, an empty list says nothing."""
        value = self._get(key, default) or default
        if not isinstance(value, list) or len(value) != layers or not all(each in (0, 1) for each in value):
            self.fail(key, f"true or false for each of {layers} layers is needed")
        return [bool(each) for each in value]

    def choice(self, key: str, known: tuple[str, ...], default: str) -> str:
        """One of the words that are known."""
        value = self._get(key, default)
        if value not in known:
            self.fail(key, f"it is not built in{nearest(str(value), known)}")
        return str(value)

    def is_list(self, key: str) -> bool:
        """Whether a key states several values."""
        return isinstance(self._values.get(key), list)

    def finish(self) -> None:
        """ModelError at the first key that was not read and may matter, or that would be read but for its prefix."""
        for key in self.file.metadata:
            prefix, _, rest = key.partition(".")
            if prefix != self.architecture and rest in self._read and rest not in self._values:
                found = f"metadata {shown(key)}: is it {self.architecture}.{rest}? That is missing; the file is damaged"
                raise self.file.fault(found)
        for key in self._values:
            if key in self._read or key in INERT:
                continue
            if key not in ABSENT:
                self.fail(key, f"{self.architecture} models are not built with this key; it would be ignored")
            value = self._get(key, None)
            if value != ABSENT[key] or isinstance(value, bool) != isinstance(ABSENT[key], bool):
                self.fail(key, f"only {shown(ABSENT[key])} is built in")

    def _count(self, key: str, value: Any, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.fail(key, f"a count from {least} on is needed")
        if value > LARGEST:
            self.fail(key, f"a count up to {LARGEST} is needed")
        return value

    def _get(self, key: str, default: Any) -> Any:
        self._read.add(key)
        value = self._values.get(key, default)
        if value is None:
            needed = f"which a {self.architecture} model must state"
            raise self.file.fault(f"the metadata lacks {self.architecture}.{key}, {needed}")
        return value
