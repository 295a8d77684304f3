"""What a folder's quantization_config says: each key is read, known not to matter, or refused by name.

Enters: the object in config.json. Leaves: a Quantization, by which tensors become weights (quantized_weights.py).
Which modules are quantised, and with how many scales, their tensors say.
Keys: https://github.com/huggingface/transformers/blob/main/src/transformers/utils/quantization_config.py and
https://github.com/vllm-project/compressed-tensors/tree/main/src/compressed_tensors/quantization
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from kernelmux.errors import nearest, shown
from kernelmux.models.stored import StoredFile

BLOCK = [128, 128]
"""Rows and columns that share a scale of FP8, where blocks do."""
STATIC = "scales that it states for activations are not used: kernels choose how activations are stored"


@dataclass(frozen=True)
class Quantization:
    """How the quantised weights of a folder are stored."""

    method: str
    """`quant_method`."""
    notes: tuple[str, ...] = ()
    """What of it is not used, though nothing of the weights is lost."""


@dataclass
class _Said:
    """An object of the configuration, and which of its keys have been read."""

    file: StoredFile
    at: str
    values: Mapping[str, Any]
    read: set[str] = field(default_factory=set)

    def fail(self, key: str, says: str) -> NoReturn:
        """ModelError about a key, with its value."""
        raise self.file.fault(f"{self.at}.{key} = {shown(self.values.get(key))}: {says}")

    def get(self, key: str, *known: Any) -> Any:
        """A key's value, which is one of those that are known, if any are told; None where it is absent."""
        self.read.add(key)
        value = self.values.get(key)
        if known and not any(value == each and type(value) is type(each) for each in known):
            stated = [shown(each) for each in known if each is not None]
            self.fail(key, f"{' or '.join(stated) or 'none'} is built in{nearest(str(value), stated)}")
        return value

    def part(self, key: str) -> _Said | None:
        """The object that a key holds; None where it is null or absent."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(key, "an object is needed")
        return _Said(self.file, f"{self.at}.{key}", value)

    def leave(self, *inert: str) -> None:
        """ModelError at the first key that is neither read nor of these, which do not matter."""
        for key in self.values:
            if key not in self.read and key not in inert:
                self.fail(key, "it is not built in, and would be ignored")


def read_quantization(file: StoredFile, said: Any) -> Quantization | None:
    """How a folder's weights are quantised; None where nothing is said, ModelError where it is not built in."""
    if said is None:
        return None
    if not isinstance(said, dict):
        raise file.fault(f"quantization_config = {shown(said)}: an object is needed")
    whole = _Said(file, "quantization_config", said)
    method = whole.get("quant_method")
    if not isinstance(method, str) or method not in _METHODS:
        whole.fail("quant_method", f"it is not built in{nearest(str(method), _METHODS)}")
    return Quantization(method, tuple(dict.fromkeys(_METHODS[method](whole))))


def _fp8(said: _Said) -> list[str]:
    """DeepSeek's blocks of 128 by 128, or one scale a tensor or row."""
    said.get("weight_block_size", None, BLOCK)
    said.get("fmt", None, "e4m3")
    said.get("scale_fmt", None, "float", "ue8m0")
    said.get("expert_dtype", None, "fp8")
    scheme = said.get("activation_scheme", None, "dynamic", "static")
    said.leave("modules_to_not_convert", "modules_to_convert", "ignored_layers", "dequantize")
    return [STATIC] if scheme == "static" else []


FORMATS = ("float-quantized", "naive-quantized")
"""What compressed-tensors may call its layouts: https://github.com/vllm-project/compressed-tensors"""


def _compressed_tensors(said: _Said) -> list[str]:
    """Groups of modules, each with a scheme; `ignore` and `targets` say which, as their tensors do."""
    said.get("format", *FORMATS)
    said.get("quantization_status", None, "compressed", "frozen")
    said.get("transform_config", None, {})
    sparsity = said.part("sparsity_config")
    if sparsity is not None and sparsity.values:
        sparsity.get("format", "dense")
    groups = said.part("config_groups")
    if groups is None or not groups.values:
        said.fail("config_groups", "the scheme of each group of modules is needed")
    notes = [note for name in groups.values if (group := groups.part(name)) for note in _group(group)]
    if said.get("kv_cache_scheme") is not None:
        notes.append("the scales that it states for caches are not used")
    said.leave("ignore", "global_compression_ratio", "version")
    return notes


def _group(group: _Said) -> list[str]:
    """A scheme: how its weights are stored, and whether activations have scales in the file."""
    group.get("format", None, *FORMATS)
    weights = group.part("weights")
    if weights is None:
        group.fail("weights", "how weights are stored is needed")
    weights.get("type", "float")
    weights.get("num_bits", 8)
    weights.get("symmetric", True)
    weights.get("dynamic", None, False)
    if weights.get("strategy", "tensor", "channel", "block") == "block":
        weights.get("block_structure", BLOCK, "128x128")
    weights.leave("block_structure", "group_size", "actorder", "observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    activations = [group.part(f"{side}_activations") for side in ("input", "output")]
    group.leave("targets")
    return [STATIC for each in activations if each is not None and each.values.get("dynamic") is not True]


_METHODS: Mapping[str, Callable[[_Said], list[str]]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
}
"""By quant_method what reads the rest, and hands back notes."""
