"""Every source is compiled by NVRTC for every card it knows; no GPU is needed."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from kernelmux.device import Device
from kernelmux.errors import BackendError
from kernelmux_cupy import source
from kernelmux_cupy.pack import TILED
from kernelmux_cupy.tuning import H100, ROW_COUNTS, Shape, tune

pytest.importorskip("cupy", reason="CuPy is not installed")
if source.refusal(Device("cuda", 0, "H100", (9, 0))) is not None:
    pytest.skip("NVRTC is not installed", allow_module_level=True)

from cupy_backends.cuda.libs import nvrtc

CARDS = [(6, 1), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]
KNOWN = [card for card in CARDS if card[0] * 10 + card[1] in source.architectures()]
RECORD = Path(__file__).parent / "registers.json"
"""Registers and bytes of spills of each kernel on an H100; KERNELMUX_RECORD=1 writes it anew."""


def shapes():
    """Each format at each row count, alone and in a pair; the three of a Q4_K_M file's attention; narrow tiles."""
    for format in TILED:
        for m in ROW_COUNTS:
            yield Shape((format,), (4096,), 4096, m)
            yield Shape((format, format), (14336, 14336), 4096, m, gated=True)
        yield Shape((format,), (28672,), 4096, 1)
        yield Shape((format,), (4096,), 14336, 1)
        if "_K" not in format:
            yield Shape((format,), (576,), 576, 1)
            yield Shape((format,), (33,), 96, 5)
    yield Shape(("Q4_K",), (28672,), 4096, 8)
    for m in ROW_COUNTS:
        yield Shape(("Q4_K", "Q4_K", "Q6_K"), (4096, 1024, 1024), 4096, m)


def label(shape):
    what = "gated" if shape.gated else "+".join(dict.fromkeys(shape.formats))
    return f"dp4a {shape.formats[0]} {what} n{sum(shape.n)} k{shape.k} m{shape.m}"


def dp4a(shape, capability, card=H100):
    count = 1 if shape.gated else len(shape.formats)
    defines = shape.defines(tune(shape, card), ["float"] * count, "float")
    return source.translate("dp4a", capability, **defines)


def numbers(log):
    """Registers and bytes of spill stores: the most of any function."""
    spills = [int(found) for found in re.findall(r"(\d+) bytes spill stores", log)]
    registers = [int(found) for found in re.findall(r"Used (\d+) registers", log)]
    return max(registers), max(spills)


@pytest.mark.slow
def test_nothing_spills_on_an_h100():
    found = {label(shape): numbers(dp4a(shape, (9, 0)).log) for shape in shapes()}
    spilled = {name: spills for name, (_, spills) in found.items() if spills}
    assert not spilled
    # The numbers are the compiler's business: on record is what the one in constraints.txt gives.
    if os.environ.get("KERNELMUX_RECORD"):
        version = ".".join(map(str, nvrtc.getVersion()))
        lines = [f"{json.dumps(name)}: {json.dumps(found[name])}" for name in found]
        RECORD.write_text(
            f'{{"nvrtc": "{version}", "registers and spills": {{\n' + ",\n".join(lines) + "\n}}\n", "utf-8"
        )
    assert json.loads(RECORD.read_text("utf-8"))["registers and spills"].keys() == found.keys()


@pytest.mark.parametrize("capability", KNOWN, ids=str)
def test_every_kernel_compiles_for_every_card(capability):
    small = replace(H100, shared=64 * 1024, shared_per_block=48 * 1024, asynchronous=False)
    card = H100 if capability >= (8, 0) else small
    for shape in shapes():
        if shape.m == 1 and (len(shape.formats) > 1 or shape.k < 4096):
            assert dp4a(shape, capability, card).code
    assert dp4a(Shape(("Q4_K", "Q4_K", "Q6_K"), (4096, 1024, 1024), 4096, 16), capability, card).code
    for name, types in {"bf16": "bf16", "f16": "f16"}.items():
        macros = {"WEIGHT": types, "INPUT": "float", "OUT": name, "ROWS": 8}
        assert source.translate("gemv", capability, **macros, OUTPUTS=2, AHEAD=4, WARPS=4).code
    assert source.translate("convert", capability, FROM="float", TO="bf16").code


@pytest.mark.parametrize("output", ["bf16", "f16", "q8"])
def test_outputs_of_every_format_compile(output):
    shape = Shape(("Q4_K",), (4096,), 4096, 1)
    assert source.translate("dp4a", (9, 0), **shape.defines(tune(shape, H100), [output], "bf16")).code


def test_a_card_newer_than_nvrtc_gets_ptx():
    shape = Shape(("Q4_0",), (64,), 256, 1)
    assert b".target sm_" in dp4a(shape, (99, 0)).code


def test_a_source_that_does_not_compile_is_reported_in_the_compilers_words():
    with pytest.raises(BackendError, match=r"convert.cu does not compile: .*FROM"):
        source.translate("convert", (9, 0), TO="float")
