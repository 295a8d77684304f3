"""A folder's config.json in GGUF's words: each key is translated, known not to matter, or refused.

Enters: the JSON object and how its model type differs. Leaves: an architecture's keys by GGUF's names, and the divisors
of a rotary embedding, which GGUF stores as tensors; ModelError names a key that would be ignored.
Keys: https://github.com/huggingface/transformers/tree/main/src/transformers/models
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from kernelmux.errors import nearest, shown
from kernelmux.graph.ops import Rotation
from kernelmux.models.architecture import Folder
from kernelmux.models.quantization import Quantization, read_quantization
from kernelmux.models.stored import StoredFile

KEYS: Mapping[str, str] = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
"""What all model types call alike."""

INERT = frozenset(
    (
        "_name_or_path", "architectures", "attention_bias", "attention_dropout", "attn_implementation",
        "_attn_implementation_autoset", "auto_map", "bos_token_id", "cache_implementation", "dtype", "embd_pdrop",
        "eos_token_id", "for_llm_compressor",
        "gradient_checkpointing", "hidden_dropout", "id2label", "initial_context_length", "initializer_range",
        "is_llama_config",
        "label2id", "max_window_layers", "mlp_bias", "model_type", "output_attentions", "output_hidden_states",
        "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop", "return_dict",
        "router_aux_loss_coef", "router_jitter_noise", "sliding_window_pattern", "_sliding_window_pattern",
        "torch_dtype", "transformers_version", "transformers.js_config", "unk_token_id", "use_cache",
        "use_sliding_window",
    )
)  # fmt: skip
"""Keys of training, of storage and of the tokenizer; what biases there are the tensors say."""

ABSENT: Mapping[str, tuple[Any, ...]] = {
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "clip_qkv": (None,),
    "is_encoder_decoder": (False,),
    "rope_interleaved": (False,),
    "use_bidirectional_attention": (False, None),
}
"""What these keys may say: that the model has no such thing."""


@dataclass
class Config:
    """The keys of one config.json, and which of them have been read."""

    file: StoredFile
    values: Mapping[str, Any]
    folder: Folder
    read: set[str] = field(default_factory=set)

    def fail(self, key: str, says: str) -> NoReturn:
        """ModelError about a key, with its value."""
        raise self.file.fault(f"{key} = {shown(self.values.get(key))}: {says}")

    def get(self, key: str, default: Any = None) -> Any:
        """A key's value; what is null is as good as absent."""
        self.read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def count(self, key: str, least: int = 1) -> int:
        """A count from `least` on, which must be stated."""
        value = self.get(key)
        if type(value) is not int or not least <= value < 2**31:
            self.fail(key, f"a count from {least} on is needed")
        return value

    def rope_number(self, rope: Mapping[str, Any], key: str, default: float | None = None) -> float:
        """A positive number of the rotary embedding's parameters."""
        value = rope.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.file.fault(f"rope parameter {key} = {shown(value)}: a positive number is needed")
        return float(value)

    def finish(self) -> None:
        """ModelError at the first key that was not read and may matter."""
        for key, value in self.values.items():
            if key in self.read or key in INERT or value in ABSENT.get(key, ()):
                continue
            if key in ABSENT:
                self.fail(key, f"only {shown(ABSENT[key][0])} is built in")
            self.fail(key, "it is not built in, and would be ignored")


@dataclass(frozen=True)
class Translation:
    """What config.json says, in GGUF's words."""

    keys: Mapping[str, Any]
    """Without the architecture's prefix."""
    divisors: Mapping[str, list[float]]
    """Tensors that GGUF has of the rotary embedding."""
    tied: bool
    quantization: Quantization | None = None
    """How weights are quantised, if they are."""


def translated(file: StoredFile, values: Mapping[str, Any], folder: Folder) -> Translation:
    """What a model's config.json says; ModelError names what is missing, wrong or not built in."""
    config = Config(file, values, folder)
    keys = dict(folder.defaults)
    keys |= {target: value for key, target in {**KEYS, **folder.keys}.items() if (value := config.get(key)) is not None}
    if "attention.key_length" in keys:
        keys["attention.value_length"] = keys["attention.key_length"]
    # Of two keys that state it transformers takes the newer one.
    stated = [key for key in ("hidden_activation", "hidden_act") if config.get(key) is not None]
    if stated and config.get(stated[0]) != folder.activation:
        config.fail(stated[0], f"only {folder.activation} is built in")
    keys |= _windows(config)
    turned, divisors = _rotation(config)
    tied = config.get("tie_word_embeddings", folder.tied)
    if not isinstance(tied, bool):
        config.fail("tie_word_embeddings", "true or false is needed")
    quantization = read_quantization(file, config.get("quantization_config"))
    config.finish()
    return Translation({**keys, **turned}, divisors, tied, quantization)


def _windows(config: Config) -> dict[str, Any]:
    """Which layers see a window; a size of one that no layer has says nothing."""
    window, layers, kinds = config.get("sliding_window"), config.count("num_hidden_layers"), config.get("layer_types")
    if kinds is not None:
        return _windows_of_kinds(config, layers, kinds)
    if "attention_chunk_size" in config.folder.keys and "attention_chunk_size" in config.values:
        return {"attention.chunk_size": config.get("attention_chunk_size", 0)}
    if window is None or not config.get("use_sliding_window", True):
        return {}
    keys: dict[str, Any] = {"attention.sliding_window": window}
    if "max_window_layers" in config.values:
        first = config.count("max_window_layers", least=0)
        keys["attention.sliding_window_pattern"] = [layer >= first for layer in range(layers)]
        return keys if first < layers else {}
    if period := config.get("sliding_window_pattern", config.get("_sliding_window_pattern")):
        keys["attention.sliding_window_pattern"] = period
    return keys


def _windows_of_kinds(config: Config, layers: int, kinds: Any) -> dict[str, Any]:
    if not isinstance(kinds, list) or len(kinds) != layers:
        config.fail("layer_types", f"one kind for each of {layers} layers is needed")
    # Of a model's layers that do not see all some see a window, or chunks.
    chunks = "attention_chunk_size" in config.folder.keys
    known = ("full_attention", "chunked_attention" if chunks else "sliding_attention")
    if odd := [kind for kind in kinds if kind not in known]:
        config.fail("layer_types", f"{shown(odd[0])} is not built in{nearest(str(odd[0]), known)}")
    apart = [kind == known[1] for kind in kinds]
    if chunks:
        size = config.count("attention_chunk_size") if any(apart) else 0
        return {"attention.chunk_pattern": apart, "attention.chunk_size": size}
    if not any(apart):
        return {}
    return {"attention.sliding_window": config.count("sliding_window"), "attention.sliding_window_pattern": apart}


def _rotation(config: Config) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The rotary embedding's keys, and its tensors of divisors."""
    rope, local = _parameters(config)
    keys: dict[str, Any] = {"rope.freq_base": config.rope_number(rope, "rope_theta", config.folder.theta)}
    if local:
        keys["rope.freq_base_swa"] = config.rope_number(local, "rope_theta")
    heads = config.count("num_attention_heads")
    head_dim = config.count("head_dim") if config.get("head_dim") else config.count("hidden_size") // heads
    dims = int(head_dim * config.rope_number(rope, "partial_rotary_factor", 1.0))
    keys["rope.dimension_count"] = dims
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise config.file.fault(f"rope_type {shown(kind)} is not built in{nearest(str(kind), _SCALINGS)}")
    scaling, parameters = _SCALINGS[kind]
    for key, value in rope.items():
        if value is not None and key not in (*_PARAMETERS, *parameters):
            told = f"rope parameter {shown(key)} = {shown(value)}: {kind} is not built with it; it would be ignored"
            raise config.file.fault(told)
    scaled, divisors = scaling(config, rope, dims)
    return {**keys, **scaled}, divisors


def _parameters(config: Config) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Those of all layers, and those of layers that see a window, where they differ.

    Folders of transformers 5 state one object, or one for each kind of layer; older ones several keys.
    """
    older = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    older["original_max_position_embeddings"] = config.get("original_max_position_embeddings")
    older = {key: value for key, value in older.items() if value is not None}
    local_theta = config.get("rope_local_base_freq")
    stated, scaling = config.get("rope_parameters", {}), config.get("rope_scaling", {})
    for key, value in (("rope_parameters", stated), ("rope_scaling", scaling)):
        if not isinstance(value, dict):
            config.fail(key, "an object is needed")
    if "full_attention" not in stated:
        return {**older, **scaling, **stated}, {} if local_theta is None else {"rope_theta": local_theta}
    full, local = stated["full_attention"], stated.get("sliding_attention", {})
    if not isinstance(full, dict) or not isinstance(local, dict):
        config.fail("rope_parameters", "an object for each kind of layer is needed")
    if local.get("rope_type", "default") != "default":
        config.fail("rope_parameters", "scaling of layers that see a window is not built in")
    return {**older, **full}, local


Scaled = tuple[dict[str, Any], dict[str, list[float]]]


def _default(config: Config, rope: Mapping[str, Any], dims: int) -> Scaled:
    return {"rope.scaling.type": "none"}, {}


def _linear(config: Config, rope: Mapping[str, Any], dims: int) -> Scaled:
    return {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_number(rope, "factor")}, {}


def _llama3(config: Config, rope: Mapping[str, Any], dims: int) -> Scaled:
    """By what each frequency is divided, which is how GGUF stores it."""
    theta = config.rope_number(rope, "rope_theta", config.folder.theta)
    original, factor = _extension(config, rope)
    low, high = (config.rope_number(rope, f"{end}_freq_factor") for end in ("low", "high"))
    if low >= high:
        raise config.file.fault(f"rope parameter low_freq_factor = {low}: less than high_freq_factor is needed")
    scaled = Rotation(theta, dims, "adjacent", "llama3", factor, original, low, high)
    pairs = zip(Rotation(theta, dims).frequencies(), scaled.frequencies(), strict=True)
    return {"rope.scaling.type": "none"}, {"rope_freqs.weight": [plain / divided for plain, divided in pairs]}


def _yarn(config: Config, rope: Mapping[str, Any], dims: int) -> Scaled:
    """GGUF states attention's temperature as a multiple of the usual one."""
    truncate = rope.get("truncate")
    if truncate is not None and not isinstance(truncate, bool):
        raise config.file.fault(f"rope parameter truncate = {shown(truncate)}: true or false is needed")
    original, factor = _extension(config, rope)
    usual = attention = _temperature(factor, 1.0)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        parts = [_temperature(factor, config.rope_number(rope, key)) for key in ("mscale", "mscale_all_dim")]
        attention = parts[0] / parts[1]
    keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original,
        "rope.scaling.yarn_beta_fast": config.rope_number(rope, "beta_fast", 32.0),
        "rope.scaling.yarn_beta_slow": config.rope_number(rope, "beta_slow", 1.0),
        "rope.scaling.attn_factor": config.rope_number(rope, "attention_factor", attention) / usual,
        "rope.scaling.yarn_truncate": truncate is not False,
    }
    return keys, {}


def _temperature(factor: float, scale: float) -> float:
    """Peng et al. 2023 (arXiv:2309.00071), section 3.4."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _extension(config: Config, rope: Mapping[str, Any]) -> tuple[int, float]:
    """The context that the model was first trained for, and how many times longer it has become."""
    context = config.count("max_position_embeddings")
    original = int(config.rope_number(rope, "original_max_position_embeddings", context))
    if original < 2:
        raise config.file.fault(f"rope parameter original_max_position_embeddings = {original}: 2 at least is needed")
    return original, config.rope_number(rope, "factor", context / original)


def _longrope(config: Config, rope: Mapping[str, Any], dims: int) -> Scaled:
    """Ding et al. 2024 (arXiv:2402.13753): divisors for short and for long contexts, and a temperature for both."""
    original, factor = _extension(config, rope)
    divisors = {}
    for length in ("short", "long"):
        numbers = rope.get(f"{length}_factor")
        if not isinstance(numbers, list) or len(numbers) != dims // 2:
            raise config.file.fault(f"rope parameter {length}_factor: {dims // 2} numbers are needed")
        parts = {f"{length}_factor[{index}]": number for index, number in enumerate(numbers)}
        divisors[f"rope_factors_{length}.weight"] = [config.rope_number(parts, key) for key in parts]
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    keys = {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": config.rope_number(rope, "attention_factor", usual),
    }
    return keys, divisors


_PARAMETERS = ("rope_theta", "rope_type", "type", "partial_rotary_factor", "original_max_position_embeddings")
"""What all kinds of rotary embedding state."""

_LONGROPE = (_longrope, ("short_factor", "long_factor", "factor", "attention_factor"))

_SCALINGS: Mapping[str, tuple[Callable[[Config, Mapping[str, Any], int], Scaled], tuple[str, ...]]] = {
    "default": (_default, ()),
    "linear": (_linear, ("factor",)),
    "llama3": (_llama3, ("factor", "low_freq_factor", "high_freq_factor")),
    "yarn": (
        _yarn,
        ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": _LONGROPE,
    "su": _LONGROPE,
}
"""By the name of its kind, with what else it states; `su` is longrope's in older folders."""
