"""Words of arguments, and typed memory behind an address, for compiled functions.

A compiled function is called with the address of its arguments, 64-bit words, and with the number of the part of its
work that it is to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

WORD = ir.IntType(64)


@intrinsic
def word(typing: Any, base: Any, index: Any) -> Any:
    """The word of that index behind an address."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, given: Any) -> ir.Value:
        return builder.load(_at(builder, given[0], given[1], WORD))

    return types.int64(types.int64, types.int64), emit


@intrinsic
def real(typing: Any, base: Any, index: Any) -> Any:
    """The word of that index as the float64 that it holds."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, given: Any) -> ir.Value:
        return builder.load(_at(builder, given[0], given[1], ir.DoubleType()))

    return types.float64(types.int64, types.int64), emit


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


def as_float(format: str) -> Callable[[Any], Any]:
    """What makes a float32 of the sixteen bits of a `bf16` or `f16`."""

    @intrinsic
    def convert(typing: Any, bits: Any) -> Any:
        def emit(context: Any, builder: ir.IRBuilder, signature: Any, given: Any) -> ir.Value:
            if format == "f16":
                return builder.fpext(builder.bitcast(given[0], ir.HalfType()), ir.FloatType())
            wide = builder.shl(builder.zext(given[0], ir.IntType(32)), ir.IntType(32)(16))
            return builder.bitcast(wide, ir.FloatType())

        return types.float32(types.uint16), emit

    made: Callable[[Any], Any] = convert
    return made


def as_bits(format: str) -> Callable[[Any], Any]:
    """What rounds a float32 to the sixteen bits of a `bf16` or `f16`, to the nearest, ties to even."""

    @intrinsic
    def convert(typing: Any, number: Any) -> Any:
        def emit(context: Any, builder: ir.IRBuilder, signature: Any, given: Any) -> ir.Value:
            i16, i32 = ir.IntType(16), ir.IntType(32)
            if format == "f16":
                return builder.bitcast(builder.fptrunc(given[0], ir.HalfType()), i16)
            bits = builder.bitcast(given[0], i32)
            odd = builder.and_(builder.lshr(bits, i32(16)), i32(1))
            rounded = builder.lshr(builder.add(bits, builder.add(odd, i32(0x7FFF))), i32(16))
            # Rounding up might make a NaN an infinity: one keeps its sign, and is quiet.
            quiet = builder.or_(builder.lshr(bits, i32(16)), i32(0x40))
            unordered = builder.fcmp_unordered("uno", given[0], given[0])
            return builder.trunc(builder.select(unordered, quiet, rounded), i16)

        return types.uint16(types.float32), emit

    made: Callable[[Any], Any] = convert
    return made


def _at(builder: ir.IRBuilder, base: ir.Value, index: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.gep(builder.inttoptr(base, kind.as_pointer()), [index])
