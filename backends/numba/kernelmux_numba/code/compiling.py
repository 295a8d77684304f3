"""Compiles a function of numba's Python to an object file.

Enters: a function of two words, the address of its arguments and the number of a part; a target. Leaves: the name of
its symbol, and the object's bytes, which need neither numba nor Python at run time.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from threading import Lock

import llvmlite.binding as llvm
import numba
from numba import types

from kernelmux_numba.target import Target

SIGNATURE = types.void(types.int64, types.int64)
FAST = {"reassoc", "contract", "nsz", "arcp", "afn"}
"""What may be done to sums and products: their order changes, infinities and NaN stay what they are."""
_LOCK = Lock()


def compiled(function: Callable[[int, int], None], target: Target) -> tuple[str, bytes]:
    """The symbol and the object file of a function, for a target."""
    with _LOCK:
        text = assembly(function, target)
    symbol = defined(text)
    module = llvm.parse_assembly(text)
    return symbol, target.machine().emit_object(module)


def assembly(function: Callable[[int, int], None], target: Target) -> str:
    """LLVM's text of a function, after numba's optimisations."""
    before = numba.config.CPU_NAME, numba.config.CPU_FEATURES
    numba.config.CPU_NAME, numba.config.CPU_FEATURES = target.cpu, target.features
    try:
        made = numba.cfunc(SIGNATURE, error_model="numpy", fastmath=FAST, nopython=True)(function)
        text: str = made.inspect_llvm()
    finally:
        numba.config.CPU_NAME, numba.config.CPU_FEATURES = before
    return text


def defined(text: str) -> str:
    """The symbol of the function itself: beside it numba defines one that is called as C would, with the same name."""
    (wrapped,) = re.findall(r'^define [^@]*@"?cfunc\.([\w.$]+)"?\(', text, re.MULTILINE)
    return f"cfunc.{wrapped}"
