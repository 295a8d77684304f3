"""What each tensor of a model is to be stored as, by a format for all and rules by name.

Enters: weights, a format, rules `PATTERN=FORMAT`. Leaves: a format for each, and why it is another than was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from kernelmux.errors import ModelError, nearest
from kernelmux.graph.formats import FORMATS, Weight, lookup
from kernelmux.graph.quantize import QUANTIZE

PLAIN = ("f32", "f16", "bf16")
FORMATS_WRITTEN = (*PLAIN, *QUANTIZE)
"""What tensors can be stored as in a GGUF file that is written here."""
NARROW: Mapping[str, str] = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What llama.cpp stores instead where a row is no multiple of 256 (src/llama-quant.cpp)."""
KEPT = ("*.ffn_gate_inp.weight",)
"""Routers of experts: as llama.cpp, they stay what they are unless a rule names a format."""
FOLDER_FORMATS = ("fp8_row", "fp8_tensor", "fp8_128x128")
"""What matrices can be stored as in a folder that is written here (fp8_folder.py)."""
VECTORS, INTEGERS = "vectors are f32", "integers stay what they are"
OTHERS = "tensors that are no matrices of layers stay what they are"
ROUTERS = "routers stay what they are"
FILE_TYPES: Mapping[str, int] = {
    **{"f32": 0, "f16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18},
    **{"bf16": 32, "MXFP4": 38},
}
"""`general.file_type`: what most tensors are stored as (llama_ftype in llama.cpp's llama.h)."""


@dataclass(frozen=True)
class Rule:
    """Tensors whose names match a glob pattern are stored in a format."""

    pattern: str
    format: str


@dataclass(frozen=True, eq=False)
class Target:
    """A weight, what it is to be stored as, and why that is not what was asked for, if it is not."""

    weight: Weight
    format: str
    reason: str = ""


Decide = Callable[[Weight, str, Rule | None], Target]
"""From a weight, the format of all and a rule for it to what it is to be stored as."""


def written_format(asked: str, option: str, written: Sequence[str] = (*FORMATS_WRITTEN, *FOLDER_FORMATS)) -> str:
    """The name of a format that can be written, in its own case; ModelError names the option where it is none."""
    known = {name.lower(): name for name in written}
    if asked.lower() in known:
        return known[asked.lower()]
    if any(asked.lower() == name.lower() for name in FORMATS):
        raise ModelError(f"{option}: {asked} is read, and not written in such a file; known: {', '.join(written)}")
    raise ModelError(f"{option}: unknown format {asked!r}{nearest(asked, written)}")


def parse_rule(text: str, format: str = "") -> Rule:
    """A rule as it is written, `blk.*.ffn_down.weight=Q6_K`; ModelError where it is none.

    Beside FP8, the `format` of all other tensors, a folder has plain numbers alone.
    """
    pattern, _, asked = text.rpartition("=")
    if not pattern or not asked:
        raise ModelError(f"--rule {text}: a rule is PATTERN=FORMAT, as 'blk.*.ffn_down.weight=Q6_K'")
    written = (format, *PLAIN) if format in FOLDER_FORMATS else FORMATS_WRITTEN
    return Rule(pattern, written_format(asked, f"--rule {text}", written))


def in_gguf(weight: Weight, format: str, rule: Rule | None) -> Target:
    """What a tensor of a GGUF file is to be stored as, by a rule for it or the format of all."""
    asked, stored = format if rule is None else rule.format, lookup(weight.format)
    if not stored.dtype.is_floating_point and stored.plain:
        return Target(weight, weight.format, INTEGERS)
    if len(weight.shape) == 1:
        return Target(weight, "f32", "" if asked == "f32" else VECTORS)
    if rule is None and any(fnmatchcase(weight.name, pattern) for pattern in KEPT):
        return Target(weight, weight.format, ROUTERS)
    columns = weight.shape[-1]
    for taken in (asked, NARROW.get(asked, "f16"), "f16"):
        if not columns % lookup(taken).block:
            break
    other = "" if taken == asked else f"{taken}: rows of {columns} do not divide into {asked}'s blocks"
    return Target(weight, taken, other)


def targets(weights: Iterable[Weight], format: str, rules: Sequence[Rule], decide: Decide = in_gguf) -> list[Target]:
    """What each weight is to be stored as: the first rule that matches, else `format`.

    As `decide` has it; in GGUF vectors are f32, integers stay what they are, and where rows do not divide into blocks
    shorter ones are taken. ModelError for a rule that changes nothing: that matches no tensor, or only such as are
    stored one way.
    """
    found, unused = [], dict.fromkeys(rules, "no tensor matches that no earlier rule has")
    for weight in weights:
        rule = next((rule for rule in rules if fnmatchcase(weight.name, rule.pattern)), None)
        target = decide(weight, format, rule)
        if rule in unused and target.reason in (VECTORS, INTEGERS, OTHERS):
            unused[rule] = f"of all that it matches {target.reason}"
        elif rule is not None:
            unused.pop(rule, None)
        found.append(target)
    for rule, reason in unused.items():
        raise ModelError(f"--rule {rule.pattern}={rule.format}: {reason}")
    return found
