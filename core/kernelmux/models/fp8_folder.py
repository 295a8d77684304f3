"""A folder of which matrices are FP8: which of its tensors they are, what they become, what its config.json says.

Enters: a folder's own tensors and config.json. Leaves: targets, tables of tensors, and a config.json that read_folder,
transformers and vLLM read. Embeddings, the head and routers stay what they are, as in folders that people have.
Layouts: compressed-tensors' `float-quantized` (https://github.com/vllm-project/compressed-tensors), and of 128 by 128
https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/finegrained_fp8.py
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from kernelmux.errors import ModelError
from kernelmux.graph.formats import ALL, Weight, lookup
from kernelmux.models.folder import StoredFolder
from kernelmux.models.names import gguf_name
from kernelmux.models.quantization import BLOCK
from kernelmux.models.targets import FOLDER_FORMATS, KEPT, OTHERS, ROUTERS, Rule, Target, targets

SCALES = {"fp8_row": "weight_scale", "fp8_tensor": "weight_scale", "fp8_128x128": "weight_scale_inv"}
"""What the scales of a module are called."""
STRATEGIES = {"fp8_row": "channel", "fp8_tensor": "tensor"}
"""compressed-tensors' words for who shares a scale."""
BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "generation_config.json", "chat_template.jinja", "chat_template.json"),
)
"""Files of text, which are copied where there are such."""
EMBEDDINGS = "embed_tokens.weight"
_MATRIX = re.compile(r"(?:.*\.)?layers\.\d+\..+\.weight")


def folder_targets(stored: StoredFolder, format: str, rules: Sequence[Rule]) -> list[Target]:
    """What each tensor of a folder is to be stored as: matrices of layers as `format`, unless a rule says otherwise.

    ModelError for a rule that changes nothing, and for experts that a folder cannot hold so.
    """

    def decide(weight: Weight, format: str, rule: Rule | None) -> Target:
        plain = lookup(weight.format).plain
        if len(weight.shape) != 2 or not weight.name.endswith(".weight"):
            if not plain:
                told = f"tensor {weight.name!r}: experts of one parameter are not read as FP8, nor as {weight.format}"
                raise ModelError(f"{stored.path}: {told} beside it", file=str(stored.path))
            return Target(weight, weight.format, OTHERS)
        target = gguf_name(weight.name, stored.folder.names)
        if rule is None and any(fnmatchcase(target, pattern) for pattern in KEPT):
            return Target(weight, weight.format, ROUTERS)
        if rule is not None and rule.format != format:
            return Target(weight, rule.format)
        # The head may be FP8 where a rule says so; no kernel reads a table of embeddings so.
        if weight.name.endswith(EMBEDDINGS) or (rule is None and not _MATRIX.fullmatch(weight.name)):
            return Target(weight, weight.format, OTHERS)
        if fault := lookup(format).check(weight.shape):
            return Target(weight, weight.format if plain else "bf16", fault)
        return Target(weight, format)

    return targets(stored.weights.values(), format, rules, decide)


def tables(planned: Iterable[Target]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and shape of each tensor of the file, by name: of FP8 the numbers, then their scales."""
    table = {}
    for target in planned:
        shape = target.weight.shape
        for name, plane in zip(_names(target), lookup(target.format).planes, strict=True):
            table[name] = plane.dtype, (1,) if plane.rows == plane.cols == ALL else plane.shape(shape)
    return table


def _names(target: Target) -> tuple[str, ...]:
    name = target.weight.name
    if target.format not in FOLDER_FORMATS:
        return (name,)
    return name, f"{name.removesuffix('.weight')}.{SCALES[target.format]}"


def config_of(stored: StoredFolder, format: str, planned: Iterable[Target]) -> dict[str, Any]:
    """config.json of the folder that is written."""
    # A head that is the table of embeddings is a module all the same.
    is_fp8 = {"lm_head.weight": False} | {
        target.weight.name: target.format in FOLDER_FORMATS
        for target in planned
        if len(target.weight.shape) == 2 and not target.weight.name.endswith(EMBEDDINGS)
    }
    apart = sorted(name.removesuffix(".weight") for name, quantised in is_fp8.items() if not quantised)
    return {**stored.config, "quantization_config": _quantization(format, apart)}


def _quantization(format: str, apart: Sequence[str]) -> Mapping[str, Any]:
    if format == "fp8_128x128":
        said = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": BLOCK}
        return {**said, "modules_to_not_convert": apart}
    weights = {"type": "float", "num_bits": 8, "symmetric": True, "strategy": STRATEGIES[format], "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": apart,
    }
