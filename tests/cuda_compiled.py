"""What the assembler says of the CuPy backend's CUDA C: registers, spills and shared memory of every function.

python tests/cuda_compiled.py     writes docs/notes/cupy-registers.json, for the cards that this NVRTC knows
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from kernelmux_cupy.source import architectures, translate

CAPABILITIES = ((6, 1), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
"""Of each generation from Pascal on."""

_STORED = {"A": "f32", "B": "bf16", "Y": "f16"}
_HEADS = {"Q": "f32", "CACHE": "bf16", "Y": "f32", "D": 128, "GROUP": 4, "PAGE": 16, "WHOLE": 0}
_NORM = {**_STORED, "TOTAL": "f32", "ADD": 1, "WIDE": 4, "CHUNKS": 1}

FUNCTIONS = {
    **{f"elementwise {op}": ("elementwise", {**_STORED, "OP": op}) for op in ("add", "mul", "silu", "swiglu")},
    "elementwise swiglu to q8_32": ("elementwise", {**_STORED, "OP": "swiglu", "Y": "q8_32"}),
    "rms_norm": ("norm", {**_NORM, "ADD": 0}),
    "add_rms_norm to q8_32": ("norm", {**_NORM, "Y": "q8_32"}),
    "add_rms_norm of 16,384 to q8_32": ("norm", {**_NORM, "Y": "q8_32", "CHUNKS": 4}),
    "add_rms_norm of 16,383": ("norm", {**_NORM, "WIDE": 1, "CHUNKS": 16}),
    "rope": ("rope", {"Q": "f32", "K": "bf16", "Q_OUT": "f16", "K_OUT": "f32", "MOST": 128}),
    "copy": ("copy", {"K": "f32", "V": "bf16", "K_CACHE": "f16", "V_CACHE": "f16", "WIDE": 4}),
    **{
        f"embed {table}": ("embed", {"TABLE": table, "Y": "f32"})
        for table in ("f32", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
    },
    "attention": ("attention", _HEADS),
    "attention whole": ("attention", {**_HEADS, "WHOLE": 1}),
    **{
        f"attention of {group} x {dim}, {cache}": ("attention", {**_HEADS, "D": dim, "GROUP": group, "CACHE": cache})
        for dim, group, cache in (
            *((64, 3, "f16"), (80, 2, "bf16"), (96, 8, "f16"), (128, 8, "bf16"), (256, 1, "f32"), (256, 8, "f32")),
        )
    },
}
"""By what it is: the file, and its macros."""


@dataclass(frozen=True)
class Used:
    """What one function takes of a multiprocessor: registers and bytes of spills a thread, bytes of shared memory."""

    name: str
    registers: int
    spilled: int
    shared: int


def used(file: str, capability: tuple[int, int], **defines: int | str) -> list[Used]:
    """Of each function of `cuda/FILE.cu`, as the assembler reports it."""
    found = []
    for part in translate(file, capability, **defines).log.split("Compiling entry function '")[1:]:
        stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        found.append(Used(part.split("'")[0], registers, int(stores) + int(loads), int(shared[1]) if shared else 0))
    return found


def known() -> list[tuple[int, int]]:
    """Of CAPABILITIES, those that this NVRTC makes machine code for."""
    return [(major, minor) for major, minor in CAPABILITIES if major * 10 + minor in architectures()]


def main() -> None:
    table = {
        f"sm_{major}{minor}": {
            label: [asdict(one) for one in used(file, (major, minor), **defines)]
            for label, (file, defines) in FUNCTIONS.items()
        }
        for major, minor in known()
    }
    target = Path(__file__).parents[1] / "docs/notes/cupy-registers.json"
    target.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
