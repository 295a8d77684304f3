"""Reads a folder as Hugging Face's libraries write it: config.json, safetensors, and the text's own files.

Enters: the path of a folder. Leaves: a ModelFile in GGUF's words: metadata by its keys, weights by its names; what of
the folder is not built in is a ModelError. Weights lie as they are stored and are read when they are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernelmux.errors import ModelError, shown
from kernelmux.graph.formats import Weight
from kernelmux.models.architecture import Folder
from kernelmux.models.architectures import find_model_type
from kernelmux.models.config import Translation, translated
from kernelmux.models.experts import experts_stacked
from kernelmux.models.gguf import ModelFile
from kernelmux.models.names import IGNORED, expert_name, gguf_name, names_in_turn
from kernelmux.models.quantization import Quantization
from kernelmux.models.quantized_weights import held_plainly, quantized_weights
from kernelmux.models.safetensors import DTYPES, json_object, plain_weight, read_planes
from kernelmux.models.stored import StoredFile, StoredPlane, StoredWeight, renamed
from kernelmux.models.transposed import taken_apart

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
_MLP_BIASES = ("granite", "llama", "smollm3")
_ATTENTION_BIASES = ("gemma", "gemma2", "gemma3_text", "gpt_oss", "llama4_text", "olmo2", "qwen3", "qwen3_moe")
BIASES = {"attention_bias": ("attn_q", (*_MLP_BIASES, *_ATTENTION_BIASES)), "mlp_bias": ("ffn_down", _MLP_BIASES)}
"""Keys of config.json that say whether modules have biases: one of these modules, and the model types that heed it."""
LARGEST_JSON = 1 << 26
"""Bytes of a JSON file."""


@dataclass(frozen=True, eq=False)
class StoredFolder:
    """What a folder holds, in its own words."""

    path: Path
    config: Mapping[str, Any]
    """config.json, or the part of it that is of the model that is read."""
    architecture: str
    folder: Folder
    """How its model type says what GGUF says."""
    said: Translation
    """What config.json says in GGUF's words."""
    weights: Mapping[str, StoredWeight]
    """By the names that they have there."""
    stamp: tuple[int, ...]


def stored_folder(path: Path) -> StoredFolder:
    """What a folder holds; ModelError says which file of it is missing, or what is wrong with it."""
    if not (path / CONFIG).exists():
        raise ModelError(f"{path}: a folder without {CONFIG}; name a .gguf file, or a model's folder", file=str(path))
    config_file = StoredFile(path / CONFIG)
    config = read_json(config_file)
    architecture, folder = find_model_type(config_file, config.get("model_type"))
    config = _within(config_file, config, folder)
    said = translated(config_file, config, folder)
    weights, stamp = _stored(path, said.quantization)
    if folder.prefix:
        own = {name.removeprefix(folder.prefix): w for name, w in weights.items() if name.startswith(folder.prefix)}
        weights = {name: renamed(weight, name) for name, weight in own.items()}
    return StoredFolder(path, config, architecture, folder, said, weights, (*config_file.stamp, *stamp))


def _within(file: StoredFile, config: dict[str, Any], folder: Folder) -> dict[str, Any]:
    """The part of config.json that is of the model that is read; how its weights are quantised all of it says."""
    if not folder.within:
        return config
    part = config.get(folder.within)
    if not isinstance(part, dict):
        raise file.fault(f"{folder.within} = {shown(part)}: an object is needed")
    return part | {key: config[key] for key in ("quantization_config",) if key in config}


def read_folder(path: Path) -> ModelFile:
    """The model in a folder; ModelError as for `stored_folder`, and where its tensors are not those of a model."""
    stored = stored_folder(path)
    said, architecture = stored.said, stored.architecture
    weights = _renamed(path, stored.weights, stored.folder)
    if said.tied:
        weights.pop("output.weight", None)
        if stored.folder.own_head and "token_embd.weight" in weights:
            weights["output.weight"] = renamed(weights["token_embd.weight"], "output.weight")
    elif "output.weight" not in weights:
        raise ModelError(
            f"{path}: tensor 'lm_head.weight' is missing, and tie_word_embeddings is false", file=str(path)
        )
    weights |= {name: _divisors(name, numbers) for name, numbers in said.divisors.items()}
    _check_biases(stored, weights)
    metadata = {"general.architecture": architecture, "general.name": path.resolve().name}
    metadata |= {f"{architecture}.{key}": value for key, value in said.keys.items()}
    notes = said.quantization.notes if said.quantization else ()
    metadata |= _template(path)
    held = held_plainly(stored.weights.values()) if said.quantization else ()
    return ModelFile(path, metadata, weights, stored.stamp, stored.folder.pairing, notes=notes, held=held)


def _check_biases(stored: StoredFolder, weights: Mapping[str, Weight]) -> None:
    """ModelError where a layer has biases that config.json denies, or lacks those that it states."""
    for key, (module, heeding) in BIASES.items():
        stated = stored.config.get(key)
        if not isinstance(stated, bool) or stored.config.get("model_type") not in heeding:
            continue
        for name in (name for name in weights if name.endswith(f".{module}.weight")):
            bias = f"{name.removesuffix('.weight')}.bias"
            if (bias in weights) != stated:
                told = f"{key} is {str(stated).lower()}, and tensor {shown(bias)} is {'missing' if stated else 'there'}"
                raise ModelError(f"{stored.path}: {told}", file=str(stored.path))


def read_json(file: StoredFile) -> dict[str, Any]:
    """The object of a JSON file, of a bounded size."""
    if file.size > LARGEST_JSON:
        raise file.fault(f"{file.size} bytes of JSON; up to {LARGEST_JSON} are read")
    return json_object(file, file.read(0, file.size))


def _stored(path: Path, quantization: Quantization | None) -> tuple[dict[str, StoredWeight], tuple[int, ...]]:
    """The weights of all files by the names that they have there, and the files' stamps."""
    if quantization is None:
        planes, stamp = _planes(path, lambda file: read_planes(file, tuple(DTYPES)))
        return {name: plain_weight(name, plane) for name, plane in planes.items()}, stamp
    planes, stamp = _planes(path, lambda file: read_planes(file, least=0))
    return quantized_weights(path, planes, quantization), stamp


def _planes(
    path: Path, read: Callable[[Path], tuple[dict[str, StoredPlane], tuple[int, int]]]
) -> tuple[dict[str, StoredPlane], tuple[int, ...]]:
    """The tensors of all files, each read so, and the files' stamps."""
    if not (path / INDEX).exists():
        if not (path / WHOLE).exists() and (parts := sorted(part.name for part in path.glob("*.safetensors"))):
            told = f"there is neither {WHOLE} nor {INDEX}, which says what lies in files such as {shown(parts[0])}"
            raise ModelError(f"{path}: {told}; fetch it, too", file=str(path))
        return read(path / WHOLE)
    where = read_json(StoredFile(path / INDEX)).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise ModelError(f"{path / INDEX}: weight_map: the file of each tensor is needed", file=str(path / INDEX))
    planes: dict[str, StoredPlane] = {}
    stamp: tuple[int, ...] = ()
    for name in sorted(set(where.values())):
        if Path(name).name != name:
            raise ModelError(f"{path / INDEX}: file {shown(name)} is not in the folder", file=str(path / INDEX))
        found, of_file = read(path / name)
        for tensor in found:
            if where.get(tensor) != name:
                says = f"says {shown(where[tensor])}" if tensor in where else "does not have it"
                told = f"tensor {shown(tensor)} lies in {name}, the index {says}"
                raise ModelError(f"{path}: {told}", file=str(path))
        planes |= found
        stamp += of_file
    if missing := [tensor for tensor in where if tensor not in planes]:
        told = f"tensor {shown(missing[0])} is not in {shown(where[missing[0]])}, where the index says it is"
        raise ModelError(f"{path}: {told}", file=str(path))
    return planes, stamp


def _renamed(path: Path, stored: Mapping[str, StoredWeight], folder: Folder) -> dict[str, Weight]:
    """The weights by GGUF's names, with norms as GGUF stores them."""
    weights: dict[str, Weight] = {}
    for name, weight in experts_stacked(path, stored, expert_name).items():
        if IGNORED.fullmatch(name):
            continue
        if in_turn := names_in_turn(name, folder.experts):
            weights |= taken_apart(path, name, weight, in_turn, folder.in_turn)
            continue
        target = gguf_name(name, folder.names)
        if target in weights:
            raise ModelError(f"{path}: two tensors are {target}, one of them {shown(name)}", file=str(path))
        if folder.norms_from_zero and target.endswith("norm.weight"):
            weights[target] = Weight(target, weight.shape, "f32", (1.0 + weight.dequantize(),))
        else:
            weights[target] = renamed(weight, target)
    return weights


def _divisors(name: str, numbers: list[float]) -> Weight:
    import torch

    return Weight(name, (len(numbers),), "f32", (torch.tensor(numbers),))


def _template(path: Path) -> dict[str, Any]:
    """The chat template, from a file of its own or the tokenizer's configuration."""
    if (own := path / "chat_template.jinja").exists():
        file = StoredFile(own)
        try:
            return {"tokenizer.chat_template": file.read(0, min(file.size, LARGEST_JSON)).decode()}
        except UnicodeDecodeError as error:
            raise file.fault(f"is not UTF-8 ({error.reason})") from error
    if (path / "tokenizer_config.json").exists():
        template = read_json(StoredFile(path / "tokenizer_config.json")).get("chat_template")
        return {} if template is None else {"tokenizer.chat_template": template}
    return {}
