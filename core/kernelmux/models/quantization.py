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
    zeros_one_less: bool = False
    """Whether zero points are stored as one less, as GPTQ's first layout does."""


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
    notes = tuple(dict.fromkeys(_METHODS[method](whole)))
    return Quantization(method, notes, method == "gptq" and "gptq_v2" not in map(said.get, GPTQ_LAYOUT))


def _fp8(said: _Said) -> list[str]:
    """DeepSeek's blocks of 128 by 128, or one scale a tensor or row."""
    said.get("weight_block_size", None, BLOCK)
    said.get("fmt", None, "e4m3")
    said.get("scale_fmt", None, "float", "ue8m0")
    said.get("expert_dtype", None, "fp8")
    scheme = said.get("activation_scheme", None, "dynamic", "static")
    said.leave("modules_to_not_convert", "modules_to_convert", "ignored_layers", "dequantize")
    return [STATIC] if scheme == "static" else []


GPTQ_LAYOUT = ("checkpoint_format", "format")
"""Which keys, in older and newer folders, name GPTQ's layout."""


def _gptq(said: _Said) -> list[str]:
    """4-bit integers packed along the inputs."""
    said.get("bits", 4)
    said.get("group_size", *GROUP_SIZES)
    for key in GPTQ_LAYOUT:
        said.get(key, None, "gptq", "gptq_v2")
    said.get("pack_dtype", None, "int32")
    said.get("is_marlin_format", None, False)
    said.get("dynamic", None, {})
    # What zero points there are and in which order inputs lie, the tensors say.
    said.leave("sym", "desc_act", "act_group_aware", "static_groups", "true_sequential", "lm_head", *_TOOLS)
    return []


def _awq(said: _Said) -> list[str]:
    """4-bit integers packed along the outputs."""
    for older, key in (("w_bit", "bits"), ("q_group_size", "group_size")):
        known: tuple[Any, ...] = (4,) if key == "bits" else GROUP_SIZES
        said.get(older, None, *known)
        said.get(key, *known, *((None,) if older in said.values else ()))
    said.get("zero_point", None, True)
    for key in ("version", "format"):
        said.get(key, None, "gemm", "GEMM")
    if said.values.get("backend") == "llm-awq":
        said.fail("backend", "its layout is not built in; convert it with AutoAWQ, version gemm")
    said.leave("modules_to_not_convert", "do_fuse", "modules_to_fuse", "fuse_max_seq_len", *_TOOLS)
    return []


_TOOLS = (
    *("backend", "batch_size", "block_name_to_quantize", "cache_block_outputs", "damp_auto_increment", "damp_percent"),
    *("dataset", "disable_exllama", "exllama_config", "max_input_length", "meta", "model_file_base_name"),
    *("model_name_or_path", "model_seqlen", "module_name_preceding_first_block", "modules_in_block_to_quantize", "mse"),
    *("pad_token_id", "tokenizer", "use_cuda_fp16", "use_exllama"),
)
"""How a model was quantised, and which kernels other engines take."""
GROUP_SIZES = (32, 64, 128, -1)
"""Columns that share a scale; -1: all of a row."""
OF_FLOATS = ("float-quantized", "naive-quantized")
"""What compressed-tensors may call its layout of FP8: https://github.com/vllm-project/compressed-tensors"""
OF_INTEGERS = ("pack-quantized",)
"""And of 4-bit integers."""
OF_MXFP4 = ("mxfp4-pack-quantized",)


def _compressed_tensors(said: _Said) -> list[str]:
    """Groups of modules, each with a scheme; `ignore` and `targets` say which, as their tensors do."""
    said.get("format", *OF_FLOATS, *OF_INTEGERS, *OF_MXFP4, "mixed-precision")
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
    weights = group.part("weights")
    if weights is None:
        group.fail("weights", "how weights are stored is needed")
    if weights.get("type", "float", "int") == "float" and weights.values.get("num_bits") == 4:
        # NVFP4 has groups of 16.
        group.get("format", None, *OF_MXFP4)
        weights.get("num_bits", 4)
        weights.get("group_size", 32)
        weights.get("strategy", "group")
        weights.get("symmetric", True)
    elif weights.values["type"] == "float":
        group.get("format", None, *OF_FLOATS)
        weights.get("num_bits", 8)
        weights.get("symmetric", True)
        if weights.get("strategy", "tensor", "channel", "block") == "block":
            weights.get("block_structure", BLOCK, "128x128")
    else:
        group.get("format", None, *OF_INTEGERS)
        weights.get("num_bits", 4)
        weights.get("strategy", "group", "channel")
        weights.get("group_size", None, *GROUP_SIZES)
    weights.get("dynamic", None, False)
    inert = ("block_structure", "group_size", "actorder", "observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    weights.leave("symmetric", *inert)
    activations = [group.part(f"{side}_activations") for side in ("input", "output")]
    group.leave("targets")
    return [STATIC for each in activations if each is not None and each.values.get("dynamic") is not True]


def _mxfp4(said: _Said) -> list[str]:
    """gpt-oss's experts."""
    said.leave("modules_to_not_convert", "dequantize")
    return []


_METHODS: Mapping[str, Callable[[_Said], list[str]]] = {
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "gptq": _gptq,
    "mxfp4": _mxfp4,
}
"""By quant_method what reads the rest, and hands back notes."""
