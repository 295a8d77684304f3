"""The architectures by the name that `general.architecture` has for them, and by config.json's `model_type`.

A distribution brings one through the entry point group `kernelmux.architectures`: its name, and an Architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points

from kernelmux.errors import ModelError, nearest, shown, where_raised
from kernelmux.models.architecture import Architecture, Folder
from kernelmux.models.architectures import gemma, gpt_oss, granite, llama, llama4, olmo, phi, qwen, smollm
from kernelmux.models.stored import StoredFile

GROUP = "kernelmux.architectures"

ARCHITECTURES: Mapping[str, Architecture] = {
    "gemma": gemma.GEMMA,
    "gemma2": gemma.GEMMA2,
    "gemma3": gemma.GEMMA3,
    "gpt-oss": gpt_oss.GPT_OSS,
    "granite": granite.GRANITE,
    "llama": llama.LLAMA,
    "llama4": llama4.LLAMA4,
    "olmo2": olmo.OLMO2,
    "phi3": phi.PHI3,
    "qwen2": qwen.QWEN2,
    "qwen3": qwen.QWEN3,
    "qwen3moe": qwen.QWEN3MOE,
    "smollm3": smollm.SMOLLM3,
}
"""Core's."""


def find_architecture(name: str) -> Architecture:
    """The architecture of that name, core's or a distribution's; ModelError where there is none that works."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    brought = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in brought:
        raise ModelError(f"unknown architecture {shown(name)}{nearest(name, {*ARCHITECTURES, *brought})}")
    entry = brought[name]
    whose = f"architecture {shown(name)} of {entry.dist.name if entry.dist else entry.value}"
    try:
        found = entry.load()
    except Exception as error:  # whatever the distribution's module raises
        said = f"{type(error).__name__} at {where_raised(error)}: {error}"
        raise ModelError(f"{whose} cannot be loaded: {said}") from error
    if not isinstance(found, Architecture):
        raise ModelError(f"{whose} is a {type(found).__name__}; an Architecture is needed")
    return found


def find_model_type(file: StoredFile, model_type: object) -> tuple[str, Folder]:
    """The architecture that folders of a model type have, and how these say it; ModelError where none has it."""
    known: dict[str, tuple[str, Folder]] = {}
    for name in (*ARCHITECTURES, *(entry.name for entry in entry_points(group=GROUP))):
        # What cannot be loaded is told to whoever asks for it by name.
        made = ARCHITECTURES.get(name)
        if made is None and str(model_type) not in known:
            made = find_architecture(name)
        known |= {each: (name, folder) for each, folder in (made.folders if made else {}).items()}
    if not isinstance(model_type, str) or model_type not in known:
        raise file.fault(f"model_type {shown(model_type)} is not built in{nearest(str(model_type), known)}")
    return known[model_type]
