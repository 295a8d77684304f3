"""Float32 from narrower formats and back, a vector at a time; and functions for which LLVM has no instruction."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernelmux_numba.code.vectors import DOUBLE, HALF, SHORT, Vectors
from kernelmux_numba.target import Target

HALF_PI = Fraction("1.57079632679489661923132169163975144209858469968755")
ITEM_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


def load(v: Vectors, format: str, address: ir.Value) -> ir.Value:
    """Numbers of a plain format as float32."""
    b = v.builder
    if format == "f32":
        return v.load(address, v.floats)
    if format == "f16":
        return v.halves(address)
    bits = b.zext(v.load(address, ir.VectorType(SHORT, v.lanes)), v.integers)
    return b.bitcast(b.shl(bits, v.integer(16)), v.floats)


def store(v: Vectors, format: str, address: ir.Value, values: ir.Value) -> None:
    """Float32 rounded to a plain format, to the nearest, ties to even."""
    b = v.builder
    if format == "f32":
        v.store(values, address)
    elif format == "f16" and v.target.float16:
        v.store(b.fptrunc(values, ir.VectorType(HALF, v.lanes)), address)
    elif format == "f16":
        v.store(b.trunc(rounded(v, values, 5, 10, 0x7C00, 0x7E00), ir.VectorType(SHORT, v.lanes)), address)
    else:
        bits = b.bitcast(values, v.integers)
        odd = b.and_(b.lshr(bits, v.integer(16)), v.integer(1))
        up = b.lshr(b.add(bits, b.add(odd, v.integer(0x7FFF))), v.integer(16))
        # Rounding up might make a NaN an infinity.
        quiet = b.or_(b.lshr(bits, v.integer(16)), v.integer(0x40))
        whole = b.select(b.fcmp_unordered("uno", values, values), quiet, up)
        v.store(b.trunc(whole, ir.VectorType(SHORT, v.lanes)), address)


def reader(target: Target, format: str) -> Any:
    """What gives the number at an address as float32, for numba's Python."""

    @intrinsic
    def read(typing: Any, address: Any) -> Any:
        def emit(context: Any, builder: ir.IRBuilder, signature: Any, given: Any) -> ir.Value:
            v = Vectors(builder, target, 1)
            return v.lane(load(v, format, given[0]))

        return types.float32(types.int64), emit

    return read


def writer(target: Target, format: str) -> Any:
    """What rounds a float32 to a format, and writes it to an address, likewise."""

    @intrinsic
    def write(typing: Any, address: Any, number: Any) -> Any:
        def emit(context: Any, builder: ir.IRBuilder, signature: Any, given: Any) -> ir.Value:
            v = Vectors(builder, target, 1)
            store(v, format, given[0], v.all_lanes(given[1]))
            return context.get_dummy_value()

        return types.void(types.int64, types.float32), emit

    return write


def rounded(v: Vectors, values: ir.Value, exponent: int, fraction: int, largest: int, nan: int) -> ir.Value:
    """The bits, in 32, of float32 rounded to so many of exponent and fraction: to the nearest, ties to even.

    What is too large becomes `largest`, and no number `nan`, both as bits.
    """
    b = v.builder
    bias, shift = 2 ** (exponent - 1) - 1, 23 - fraction
    bits = b.bitcast(values, v.integers)
    size = b.and_(bits, v.integer(0x7FFFFFFF))
    # Beside this number, a float32's last bit is worth the narrow format's least number.
    beside = (127 + 24 - bias - fraction) << 23
    raised = b.fadd(b.bitcast(size, v.floats), b.bitcast(v.integer(beside), v.floats))
    small = b.sub(b.bitcast(raised, v.integers), v.integer(beside))
    odd = b.and_(b.lshr(size, v.integer(shift)), v.integer(1))
    offset = (2 ** (shift - 1) - 1 - ((127 - bias) << 23)) & 0xFFFFFFFF
    normal = b.lshr(b.add(b.add(size, odd), v.integer(offset)), v.integer(shift))
    whole = b.select(b.icmp_unsigned("<", size, v.integer((128 - bias) << 23)), small, normal)
    whole = b.select(b.icmp_unsigned(">", whole, v.integer(largest)), v.integer(largest), whole)
    whole = b.select(b.icmp_unsigned(">", size, v.integer(0x7F800000)), v.integer(nan), whole)
    sign = b.lshr(b.and_(bits, v.integer(0x80000000)), v.integer(31 - exponent - fraction))
    return b.or_(whole, sign)


def exp_of_negative(v: Vectors, x: ir.Value) -> ir.Value:
    """exp(x) for x up to 0: 2^n by a polynomial of what is left, at most half a ln 2."""
    b = v.builder
    least = v.constant(-104.0)
    # Below that it is 0; a NaN is kept.
    x = b.select(b.fcmp_ordered("<", x, least), least, x)
    n = v.call(f"llvm.rint.v{v.lanes}f32", v.floats, b.fmul(x, v.constant(1 / math.log(2))))
    high = 0.693359375  # ln 2 in ten bits, by which n is multiplied exactly.
    rest = v.fma(n, v.constant(-high), x)
    rest = v.fma(n, v.constant(high - math.log(2)), rest)
    power = v.polynomial(rest, [1 / math.factorial(degree) for degree in range(7, -1, -1)])
    whole = b.fptosi(n, v.integers)
    # In two steps: the least powers of two are no normal numbers.
    first = b.ashr(whole, v.integer(1))
    for step in (first, b.sub(whole, first)):
        scale = b.bitcast(b.shl(b.add(step, v.integer(127)), v.integer(23)), v.floats)
        power = b.fmul(power, scale)
    return power


def turns(v: Vectors, angles: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Cosine and sine, float32, of angles in float64."""
    b = v.builder
    wide = angles.type

    def constant(value: float) -> ir.Value:
        return ir.Constant(wide, [value] * v.lanes)

    quarter = b.fmul(angles, constant(float(1 / HALF_PI)))
    n = v.call(f"llvm.rint.v{v.lanes}f64", wide, quarter)
    rest, left = angles, HALF_PI
    # In parts of 33 bits, by which n is multiplied exactly.
    for bits in (32, 65, 118):
        step = Fraction(math.floor(left * 2**bits), 2**bits)
        rest, left = v.fma(n, constant(-float(step)), rest), left - step
    r = b.fptrunc(rest, v.floats)
    square = b.fmul(r, r)
    sine = b.fmul(r, v.polynomial(square, _series(1, 9)))
    cosine = v.polynomial(square, _series(0, 10))
    quadrant = b.fptosi(n, v.integers)
    odd = b.icmp_signed("!=", b.and_(quadrant, v.integer(1)), v.integer(0))

    def signed(value: ir.Value, number: ir.Value) -> ir.Value:
        sign = b.shl(b.and_(number, v.integer(2)), v.integer(30))
        return b.bitcast(b.xor(b.bitcast(value, v.integers), sign), v.floats)

    return (
        signed(b.select(odd, sine, cosine), b.add(quadrant, v.integer(1))),
        signed(b.select(odd, cosine, sine), quadrant),
    )


def doubles(v: Vectors) -> ir.VectorType:
    """A vector of float64."""
    return ir.VectorType(DOUBLE, v.lanes)


def _series(first: int, last: int) -> list[float]:
    """Of sine (powers from 1) or cosine (from 0), by the square of the angle, the highest power first."""
    return [(-1) ** (power // 2) / math.factorial(power) for power in range(last, first - 1, -2)]
