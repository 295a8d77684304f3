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
    found: bytes = target.machine().emit_object(optimised(function, target))
    return found


def optimised(function: Callable[[int, int], None], target: Target) -> llvm.ModuleRef:
    """LLVM's module of a function, optimised once and whole."""
    module = llvm.parse_assembly(_assembly(function, target))
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = True
    builder = llvm.create_pass_builder(target.machine(), options)
    builder.getModulePassManager().run(module, builder)
    return module


def _assembly(function: Callable[[int, int], None], target: Target) -> str:
    """LLVM's text of a function, of which numba has optimised nothing: it would do so with every function it calls."""
    config, level = numba.config, type(numba.config.OPT)
    ours = {"CPU_NAME": target.cpu, "CPU_FEATURES": target.features, "OPT": level(0)}
    before = {name: getattr(config, name) for name in ours}
    try:
        vars(config).update(ours)
        text = numba.cfunc(SIGNATURE, error_model="numpy", fastmath=FAST)(function).inspect_llvm()
    finally:
        vars(config).update(before)
    (native,) = re.findall(r'^define [^@]*@"?cfunc\.([\w.$]+)"?\(', text, re.MULTILINE)
    kept = re.sub(r'^define [^\n]*@"?cfunc\..*?^}\n', "", text, flags=re.MULTILINE | re.DOTALL)
    return kept + ENTRY.format(symbol=SYMBOL, native=native)
