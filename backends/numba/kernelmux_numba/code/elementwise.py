"""Ops of one element at a time, on numbers of any formats; the identity among them, which converts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from llvmlite import ir

from kernelmux_numba.code.convert import Rows, over, planes_of
from kernelmux_numba.code.numbers import exp_of_negative
from kernelmux_numba.code.vectors import Vectors, function_of, given, share
from kernelmux_numba.target import Target


def elementwise(target: Target, op: str, inputs: Sequence[str], output: str) -> Callable[[int, int], None]:
    """Words: elements, those of a part, and the planes of each input and of the output."""
    formats = (*inputs, output)

    def lay(b: ir.IRBuilder, words: ir.Value, part: ir.Value) -> None:
        count, each, *planes = given(b, words, 2 + sum(map(planes_of, formats)))
        rows = [Rows(format, [planes.pop(0) for _ in range(planes_of(format))]) for format in formats]
        first, mine = share(b, part, each, count)

        def body(v: Vectors, index: ir.Value) -> None:
            rows[-1].store(v, index, OPS[op](v, *(row.load(v, index) for row in rows[:-1])))

        over(b, target, first, mine, body)

    return function_of(lay)


def _silu(v: Vectors, x: ir.Value) -> ir.Value:
    """By exp(-|x|), which cannot overflow: x / (1 + exp(-x)), of which the second is x exp(x) / (1 + exp(x))."""
    b = v.builder
    size = b.bitcast(b.and_(b.bitcast(x, v.integers), v.integer(0x7FFFFFFF)), v.floats)
    power = exp_of_negative(v, b.fsub(v.constant(-0.0), size))
    share_ = b.select(b.fcmp_ordered("<", x, v.constant(0.0)), power, v.constant(1.0))
    return b.fmul(x, b.fdiv(share_, b.fadd(v.constant(1.0), power)))


OPS: Mapping[str, Callable[..., ir.Value]] = {
    "convert": lambda v, x: x,
    "add": lambda v, a, c: v.builder.fadd(a, c),
    "mul": lambda v, a, c: v.builder.fmul(a, c),
    "silu": _silu,
    "swiglu": lambda v, gate, up: v.builder.fmul(_silu(v, gate), up),
}
"""By op what becomes of its inputs' vectors."""
