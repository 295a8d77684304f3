"""Compiles a function of numba's Python to an object file.

Enters: a function of two words, the address of its arguments and the number of a part; a target. Leaves: the bytes of
an object that defines SYMBOL and needs neither numba nor Python.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import llvmlite.binding as llvm
import numba
from numba import types

from kernelmux_numba.loaded import SYMBOL
from kernelmux_numba.target import Target

SIGNATURE = types.void(types.int64, types.int64)
FAST = {"reassoc", "contract", "nsz", "arcp", "afn"}
"""What may be done to sums and products: their order changes, infinities and NaN stay what they are."""
ENTRY = """
define void @{symbol}(i64 %words, i64 %part) {{
  %result = alloca ptr
  %raised = alloca ptr
  call i32 @{native}(ptr %result, ptr %raised, i64 %words, i64 %part)
  ret void
}}
"""
"""How a function is entered: numba's own entry would call Python where it raised, and nothing here does."""


def compiled(function: Callable[[int, int], None], target: Target) -> bytes:
    """The object file of a function, for a target."""
    found: bytes = target.machine().emit_object(llvm.parse_assembly(assembly(function, target)))
    return found


def assembly(function: Callable[[int, int], None], target: Target) -> str:
    """LLVM's text of a function, after numba's optimisations."""
    before = numba.config.CPU_NAME, numba.config.CPU_FEATURES
    numba.config.CPU_NAME, numba.config.CPU_FEATURES = target.cpu, target.features
    try:
        text = numba.cfunc(SIGNATURE, error_model="numpy", fastmath=FAST)(function).inspect_llvm()
    finally:
        numba.config.CPU_NAME, numba.config.CPU_FEATURES = before
    (native,) = re.findall(r'^define [^@]*@"?cfunc\.([\w.$]+)"?\(', text, re.MULTILINE)
    kept = re.sub(r'^define [^\n]*@"?cfunc\..*?^}\n', "", text, flags=re.MULTILINE | re.DOTALL)
    return kept + ENTRY.format(symbol=SYMBOL, native=native)
