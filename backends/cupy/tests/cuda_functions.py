"""The functions of the CuPy backend that its tests compile: of each source what plans ask of it, by a name."""

from __future__ import annotations

from kernelmux_cupy.embed import BLOCKS
from kernelmux_cupy.pack import TILED
from kernelmux_cupy.tuning import H100, ROW_COUNTS, Card, Shape, tune

MATRICES = {
    **{
        f"{format} {kind} m{m}": Shape(formats, n, 4096, m, gated=len(n) == 2)
        for format in TILED
        for m in ROW_COUNTS
        for kind, formats, n in (
            ("4096x4096", (format,), (4096,)),
            ("gated 14336x4096", (format, format), (14336, 14336)),
        )
    },
    **{
        f"{format} {n}x{k} m{m}": Shape((format,), (n,), k, m)
        for format in TILED
        for n, k, m in ((28672, 4096, 1), (4096, 14336, 1), (576, 576, 1), (33, 96, 5))
        if "_K" not in format or k % 256 == 0
    },
    "Q4_K 28672x4096 m8": Shape(("Q4_K",), (28672,), 4096, 8),
    # The attention of a Q4_K_M file.
    **{
        f"Q4_K+Q4_K+Q6_K 6144x4096 m{m}": Shape(("Q4_K", "Q4_K", "Q6_K"), (4096, 1024, 1024), 4096, m)
        for m in ROW_COUNTS
    },
}

STORED = {"A": "f32", "B": "bf16", "Y": "f16"}
NORM = {**STORED, "TOTAL": "f32", "ADD": 1, "WIDE": 4, "CHUNKS": 1}
HEADS = {"Q": "f32", "CACHE": "bf16", "Y": "f32", "D": 128, "GROUP": 4, "PAGE": 16, "WHOLE": 0}
GEMV = {"INPUT": "f32", "OUT": "f32", "WARPS": 4}

PLAIN = {
    **{f"elementwise {op}": ("elementwise", {**STORED, "OP": op}) for op in ("add", "mul", "silu", "swiglu")},
    "elementwise swiglu to q8_32": ("elementwise", {**STORED, "OP": "swiglu", "Y": "q8_32"}),
    "rms_norm": ("norm", {**NORM, "ADD": 0}),
    "add_rms_norm to q8_32": ("norm", {**NORM, "Y": "q8_32"}),
    "add_rms_norm of 16,384 to q8_32": ("norm", {**NORM, "Y": "q8_32", "CHUNKS": 4}),
    "add_rms_norm of 16,383": ("norm", {**NORM, "WIDE": 1, "CHUNKS": 16}),
    "rope": ("rope", {"Q": "f32", "K": "bf16", "Q_OUT": "f16", "K_OUT": "f32", "MOST": 128}),
    "copy": ("copy", {"K": "f32", "V": "bf16", "K_CACHE": "f16", "V_CACHE": "f16", "WIDE": 4}),
    "convert f32 to bf16": ("convert", {"FROM": "f32", "TO": "bf16"}),
    "convert f16 to f32": ("convert", {"FROM": "f16", "TO": "f32"}),
    **{f"embed {table}": ("embed", {"TABLE": table, "Y": "f32"}) for table in ("f32", *BLOCKS)},
    "attention": ("attention", HEADS),
    "attention whole": ("attention", {**HEADS, "WHOLE": 1}),
    **{
        f"attention of {group} x {dim}, {cache}": ("attention", {**HEADS, "D": dim, "GROUP": group, "CACHE": cache})
        for dim, group, cache in (
            *((64, 3, "f16"), (80, 2, "bf16"), (96, 8, "f16"), (128, 8, "bf16"), (256, 1, "f32"), (256, 8, "f32")),
        )
    },
    **{
        f"gemv {weight} m{rows}": ("gemv", {**GEMV, "WEIGHT": weight, "ROWS": rows, "OUTPUTS": n, "AHEAD": 8 // n})
        for weight in ("bf16", "f16")
        for rows, n in ((1, 2), (2, 2), (4, 4), (8, 4))
    },
}

EVERYWHERE = (
    *(f"dp4a {format} gated 14336x4096 m1" for format in TILED),
    *("dp4a Q4_0 33x96 m5", "dp4a Q4_K+Q4_K+Q6_K 6144x4096 m16", "gemv bf16 m8", "elementwise swiglu to q8_32"),
    *("add_rms_norm to q8_32", "rope", "copy", "convert f32 to bf16", "embed Q6_K", "attention"),
)
"""What is compiled for every card: each source, and each format of DP4A."""


def functions(card: Card = H100) -> dict[str, tuple[str, dict[str, int | str]]]:
    """By what it is: the file, and its macros; DP4A's as they are chosen for a card."""
    products = {}
    for label, shape in MATRICES.items():
        outputs = ["f32"] * (1 if shape.gated else len(shape.formats))
        products[f"dp4a {label}"] = ("dp4a", shape.defines(tune(shape, card), outputs, "f32"))
    return {**products, **PLAIN}
