"""Norms of rows: their squares are summed on the way through, or on that of the addition before them."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from kernelmux_numba.code.convert import Rows, over, planes_of, reduced
from kernelmux_numba.code.vectors import DOUBLE, FLOAT, Vectors, function_of, given, loop, share
from kernelmux_numba.packing import BLOCK
from kernelmux_numba.target import Target


def norm(target: Target, adds: bool, output: str) -> Callable[[int, int], None]:
    """Words: rows, those of a part, columns, epsilon, gamma, x, y's planes; where it adds, what is added to x, sum."""

    def lay(b: ir.IRBuilder, words: ir.Value, part: ir.Value) -> None:
        rows, each, columns, epsilon, *tensors = given(b, words, 6 + planes_of(output) + (2 if adds else 0))
        gamma, x, *planes = tensors[: 2 + planes_of(output)]
        added = [Rows("f32", [tensor]) for tensor in tensors[2 + planes_of(output) :]]
        gammas, inputs, y = Rows("f32", [gamma]), Rows("f32", [x]), Rows(output, planes)
        first, mine = share(b, part, each, rows)
        least = b.fptrunc(b.bitcast(epsilon, DOUBLE), FLOAT)

        def row(number: ir.Value) -> tuple[()]:
            start = b.mul(b.add(first, number), columns)

            def squares(v: Vectors, index: ir.Value, so_far: ir.Value) -> ir.Value:
                value = inputs.load(v, index)
                if adds:
                    value = b.fadd(value, added[0].load(v, index))
                    added[1].store(v, index, value)
                return v.fma(value, value, so_far)

            wide, one = Vectors(b, target, BLOCK), Vectors(b, target, 1)
            total = one.lane(reduced(b, target, start, columns, wide.constant(0.0), squares, b.fadd))
            mean = b.fdiv(total, b.sitofp(columns, FLOAT))
            root = one.call("llvm.sqrt.f32", FLOAT, b.fadd(mean, least))
            scale = b.fdiv(FLOAT(1.0), root)
            normed = added[1] if adds else inputs

            def scaled(v: Vectors, index: ir.Value) -> None:
                value = b.fmul(normed.load(v, index), v.all_lanes(scale))
                y.store(v, index, b.fmul(value, gammas.load(v, b.sub(index, start))))

            over(b, target, start, columns, scaled)
            return ()

        loop(b, mine, [], row)

    return function_of(lay)
