"""How functions are launched, as far as no card is needed."""

import ctypes
import re

import pytest

from kernelmux_cupy.launch import _Attribute, _Config, _overlap
from kernelmux_cupy.source import FOLDER


def test_structures_are_the_drivers():
    """CUlaunchConfig and CUlaunchAttribute of cuda.h, on 64 bits."""
    assert (ctypes.sizeof(_Config), _Config.stream.offset, _Config.attributes.offset) == (56, 32, 40)
    assert (ctypes.sizeof(_Attribute), _Attribute.value.offset) == (72, 8)
    assert (_overlap().id, _overlap().value) == (6, 1)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.cu")), ids=lambda path: path.stem)
def test_every_kernel_waits_for_what_the_one_before_writes(path):
    """A launch overlaps with the one before it: see order.cuh."""
    text = path.read_text("utf-8")
    kernels = len(re.findall(r'extern "C" __global__', text))
    assert kernels
    assert text.count("    follow();\n") == kernels or ("wait_for_inputs();" in text and "let_next_start();" in text)
    # The read-only cache may hold what was there before.
    assert "__ldg" not in text
