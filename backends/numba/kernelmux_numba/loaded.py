"""Addresses of compiled functions: from the cache on disk, or compiled once and put there.

Enters: where a function is made, as `products:quantised`, and the constants that it is made with. Leaves: its address
in this process. numba is imported where something has to be compiled, and only there.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from threading import Lock
from typing import Any

import kernelmux_numba
from kernelmux.contract.cache import Cache, library_versions, source_hash
from kernelmux_numba.target import Target

CACHE = Cache("numba")
SYMBOL = "kernelmux_numba"
"""What an object file calls its function."""
_LOCK = Lock()
_ENGINES: list[Any] = []
"""What holds the machine code: as long as the process."""


def address_of(made: str, target: Target, *constants: Any) -> int:
    """The address of the function that `module:function` of `kernelmux_numba.code` makes with these constants."""
    with _LOCK:
        return _address(made, target, constants)


@cache
def _address(made: str, target: Target, constants: tuple[Any, ...]) -> int:
    versions = library_versions(("numba", "llvmlite"))
    # All of the target: one processor has code for several numbers of lanes, as it is limited to older classes.
    key = Cache.key(source_hash(kernelmux_numba), versions, repr(target), made, repr(constants))
    if (code := CACHE.get(key)) is None:
        from kernelmux_numba.code.compiling import compiled

        module, _, name = made.partition(":")
        make = getattr(import_module(f"kernelmux_numba.code.{module}"), name)
        code = compiled(make(target, *constants), target)
        CACHE.put(key, code)
    return _load(code, target)


def _load(code: bytes, target: Target) -> int:
    import llvmlite.binding as llvm

    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target.machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _ENGINES.append(engine)
    return int(engine.get_function_address(SYMBOL))
