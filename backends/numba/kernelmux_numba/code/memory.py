"""Words of arguments, and typed memory behind an address, for compiled functions.

A compiled function is called with the address of its arguments, 64-bit words, and with the number of the part of its
work that it is to do.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

WORD = ir.IntType(64)
inner = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""What is called from a part's function: it raises nothing, and nothing else calls it."""


def instructions(lay: Callable[..., Any], count: int, result: types.Type = types.void) -> Any:
    """Instructions as a function of so many words for numba's Python: `lay(builder, *words)` lays them where it is
    called, and gives what they result in, if anything."""

    def typed(typing: Any, *words: Any) -> Any:
        def emit(context: Any, builder: ir.IRBuilder, signature: Any, given: Any) -> ir.Value:
            found = lay(builder, *given)
            return context.get_dummy_value() if result == types.void else found

        return result(*[types.int64] * count), emit

    # numba wants to know each argument.
    names = ("typing", *(f"word{number}" for number in range(count)))
    typed.__signature__ = Signature(  # type: ignore[attr-defined]
        [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    return intrinsic(typed)


def at_index(builder: ir.IRBuilder, base: ir.Value, index: ir.Value) -> ir.Value:
    """A pointer to the word of that index behind an address."""
    return builder.gep(builder.inttoptr(base, WORD.as_pointer()), [index])


word = instructions(lambda builder, base, index: builder.load(at_index(builder, base, index)), 2, types.int64)
"""word(base, index): the word of that index behind an address."""


def pointer(kind: types.Type) -> Callable[[int], Any]:
    """What makes an address a pointer to elements of a type."""

    @intrinsic
    def at(typing: Any, address: Any) -> Any:
        def emit(context: Any, builder: ir.IRBuilder, signature: Any, given: Any) -> ir.Value:
            return builder.inttoptr(given[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), emit

    made: Callable[[int], Any] = at
    return made


floats = pointer(types.float32)
"""float32."""
integers = pointer(types.int32)
"""int32."""
small = pointer(types.int8)
"""int8."""
words_at = pointer(types.int64)
"""int64."""
narrow = pointer(types.uint16)
"""Sixteen bits: bfloat16 or float16."""
