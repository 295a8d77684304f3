"""Powers of two and what is made of them, for a vector or a single number: laid as LLVM's instructions."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from kernelmux_numba.code.vectors import INTEGER

LOG2E = 1.4426950408889634
POWERS = (0.693146977598858, 0.24022242085173168, 0.05550733743691143, 0.009671512648910646, 0.0013264727065271898)
"""2^f = 1 + f (c0 + f (c1 + ...)) for f from -1/2 to 1/2: the least relative error, 9e-8, with five of them."""
LEAST = -127.0
"""The exponent whose bits are zero: 2 to that power or less is 0."""


def splat(kind: ir.Type, value: float) -> ir.Constant:
    """A number as that type has it, in every lane."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def alike(kind: ir.Type, element: ir.Type) -> ir.Type:
    """The type of as many elements of another type."""
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def power(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """2^x for x up to 0, with an error under 1.4 units in the last place; NaN stays NaN, results below 2^-126 are 0."""
    kind = x.type
    integers = alike(kind, INTEGER)
    x = b.select(b.fcmp_ordered("<", x, splat(kind, LEAST)), splat(kind, LEAST), x)
    # Not by adding a large number and taking it off again, which the order of sums being free would undo.
    rounded = _call(b, "rint", x)
    rest = b.fsub(x, rounded)
    sum_ = splat(kind, POWERS[-1])
    for factor in (*reversed(POWERS[:-1]), 1.0):
        sum_ = _call(b, "fmuladd", sum_, rest, splat(kind, factor))
    exponent = b.shl(b.fptosi(rounded, integers), splat(integers, 23))
    return b.fmul(sum_, b.bitcast(b.add(exponent, splat(integers, 127 << 23)), kind))


def tanh(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """(1 - t) / (1 + t) with x's sign, t = e^(-2 |x|)."""
    kind, integers = x.type, alike(x.type, INTEGER)
    sign = b.and_(b.bitcast(x, integers), splat(integers, 1 << 31))
    size = b.bitcast(b.xor(b.bitcast(x, integers), sign), kind)
    t = power(b, b.fmul(size, splat(kind, -2 * LOG2E)))
    result = b.fdiv(b.fsub(splat(kind, 1.0), t), b.fadd(splat(kind, 1.0), t))
    return b.bitcast(b.or_(b.bitcast(result, integers), sign), kind)


def larger(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger of two numbers; the second where one is NaN."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def _call(b: ir.IRBuilder, name: str, *operands: ir.Value) -> ir.Value:
    """LLVM's own function of numbers of one type."""
    kind = operands[0].type
    suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
    function = ir.FunctionType(kind, [kind] * len(operands))
    return b.call(cgutils.get_or_insert_function(b.module, function, f"llvm.{name}.{suffix}"), operands)
