"""Every source is compiled by NVRTC for every card it knows; no GPU is needed."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from cuda_functions import EVERYWHERE, functions
from kernelmux.contract.device import Device
from kernelmux.errors import BackendError
from kernelmux_cupy import source
from kernelmux_cupy.tuning import H100, Shape, tune

if refused := source.refusal(Device("cuda", 0, "H100", (9, 0))):
    pytest.skip(refused.reason, allow_module_level=True)

from cupy_backends.cuda.libs import nvrtc

CARDS = [(6, 1), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]
"""Of each generation from Pascal on."""
KNOWN = [card for card in CARDS if card[0] * 10 + card[1] in source.architectures()]
RECORD = Path(__file__).parent / "registers.json"
"""What each function takes of an H100; KERNELMUX_RECORD=1 writes it anew."""


def used(file, capability, defines):
    """Registers, bytes of spills and of shared memory, the most of any function of the source."""
    log = source.translate(file, capability, **defines).log
    spills = [int(found) for found in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    registers = [int(found) for found in re.findall(r"Used (\d+) registers", log)]
    shared = [int(found) for found in re.findall(r"(\d+) bytes smem", log)]
    return [max(registers), max(spills), max(shared, default=0)]


@pytest.mark.slow
def test_nothing_spills_on_an_h100():
    found = {label: used(file, (9, 0), defines) for label, (file, defines) in functions().items()}
    assert not {label for label, (_, spilled, _) in found.items() if spilled}
    # The numbers are the compiler's business: on record is what the one in constraints.txt gives.
    if os.environ.get("KERNELMUX_RECORD"):
        version = ".".join(map(str, nvrtc.getVersion()))
        lines = [f"{json.dumps(label)}: {numbers}" for label, numbers in found.items()]
        table = ",\n".join(lines)
        RECORD.write_text(f'{{"nvrtc": "{version}", "registers, spills, shared": {{\n{table}\n}}}}\n', "utf-8")
    assert json.loads(RECORD.read_text("utf-8"))["registers, spills, shared"].keys() == found.keys()


@pytest.mark.parametrize(
    "capability", [pytest.param(known, marks=[] if known == (9, 0) else pytest.mark.slow) for known in KNOWN], ids=str
)
def test_every_source_compiles_for_every_card(capability):
    small = replace(H100, shared=64 * 1024, shared_per_block=48 * 1024, ampere=False)
    found = functions(H100 if capability >= (8, 0) else small)
    for label in EVERYWHERE:
        file, defines = found[label]
        assert source.translate(file, capability, **defines).code, label


@pytest.mark.parametrize("output", ["bf16", "f16", "q8_32"])
def test_outputs_of_every_format_compile(output):
    shape = Shape(("Q4_K",), (4096,), 4096, 1)
    assert source.translate("dp4a", (9, 0), **shape.defines(tune(shape, H100), [output], "bf16")).code


def test_a_card_newer_than_nvrtc_gets_ptx():
    file, defines = functions()["dp4a Q4_0 4096x4096 m1"]
    assert b".target sm_" in source.translate(file, (99, 0), **defines).code


def test_a_source_that_does_not_compile_is_reported_in_the_compilers_words():
    with pytest.raises(BackendError, match=r"convert.cu does not compile: .*FROM"):
        source.translate("convert", (9, 0), TO="f32")
