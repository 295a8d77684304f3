"""Products of up to four rows with a weight matrix that is read once, its numbers decoded in registers, in float32.

WEIGHT, GATED, OUTPUTS and the operands are as few_rows_kernels.py states them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernelmux_triton.few_rows_kernels import affine, is_nibbles, rows_of, silu, write


@triton.jit
def _pair_of(total, TALL: tl.constexpr):
    """Sums [TALL] of gate above up as two of half the length."""
    return tl.split(tl.trans(tl.reshape(total, [2, TALL // 2])))


@triton.jit
def _finish_row(
    acc, of_row, x_row, tile, bias, residual, y0, y1, y2, n, end0, end1,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, OUTPUTS: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """Of one row of x: sums [TALL, threads' shares] added up, times W's scales of each row, and written."""
    # Scaled after they are added up: of a product and a sum the compiler makes one operation, which rounds otherwise in
    # each of two threads that exchange their shares; all that hold a sum must hold the same.
    total = tl.sum(acc, axis=1) * of_row
    if GATED:
        gate, up = _pair_of(total, TALL)
        row = (tile * (TALL // 2) + tl.arange(0, TALL // 2)).to(tl.int64)
        inside = row < n
        if BIAS:
            gate += tl.load(bias + row, mask=inside, other=0.0)
            up += tl.load(bias + n + row, mask=inside, other=0.0)
        write(silu(gate) * up, row, inside, x_row, bias, residual, y0, y1, y2, n, 0, 0, False, RESIDUAL, 1)
    else:
        row = (tile * TALL + tl.arange(0, TALL)).to(tl.int64)
        inside = row < n
        write(total, row, inside, x_row, bias, residual, y0, y1, y2, n, end0, end1, BIAS, RESIDUAL, OUTPUTS)


@triton.jit
def _add(
    acc, low, high, scale, minimum, x, at, inside,
    WEIGHT: tl.constexpr, NIBBLES: tl.constexpr, LANE: tl.constexpr, SHARES: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """acc [TALL, SHARES] + W x of the columns `at`, a thread's share of them added up in its place.

    `low` [TALL, SHARES * LANE] are W's numbers; of q8_0 two threads have 16 of a block's 32 columns each. Of nibbles a
    thread has a block in 16 bytes, whose other columns, 16 on, are `high`.
    """
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if NIBBLES:
        second = tl.load(x + at + 16, mask=inside, other=0.0).to(tl.float32)
        products = tl.sum(tl.reshape(low * first[None, :] + high * second[None, :], [TALL, SHARES, 16]), axis=2)
        together = tl.sum(tl.reshape(first + second, [SHARES, 16]), axis=1)
        part = scale * products + minimum * together[None, :]
    else:
        part = tl.sum(tl.reshape(low * first[None, :], [TALL, SHARES, LANE]), axis=2)
        if WEIGHT == "q8_0":
            part = scale * part
    return acc + part


@triton.jit(do_not_specialize=["m"])
def gemv(
    x, w, scales, pairs, bias, residual, y0, y1, y2, m, n, k, end0, end1,
    WEIGHT: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    OUTPUTS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, LANE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = x Wᵀ for 1 to ROWS (1, 2, 4) rows. Program: TALL rows of W, all columns, WIDE at a time, STAGES under way.

    Moves W and its scales once, x once a program (from the L2 cache), y once. A thread loads 16 bytes of W at once.
    """
    tile = tl.program_id(0)
    row, row_inside = rows_of(tile, n, GATED, TALL)
    nibbles: tl.constexpr = is_nibbles(WEIGHT)
    # Columns of the w that is loaded, and the share of them that one thread adds up.
    held: tl.constexpr = WIDE // 2 if nibbles else WIDE
    shares: tl.constexpr = held // LANE
    acc0 = tl.zeros([TALL, shares], tl.float32)
    acc1 = tl.zeros([TALL, shares], tl.float32)
    acc2 = tl.zeros([TALL, shares], tl.float32)
    acc3 = tl.zeros([TALL, shares], tl.float32)
    x1 = x + tl.minimum(1, m - 1).to(tl.int64) * k
    x2 = x + tl.minimum(2, m - 1).to(tl.int64) * k
    x3 = x + tl.minimum(3, m - 1).to(tl.int64) * k
    lane = tl.arange(0, held)
    for start in tl.range(0, k, WIDE, num_stages=STAGES):
        if nibbles:
            at = start + (lane // 16) * 32 + lane % 16
            inside = at < k
            stored = tl.load(
                w + row[:, None] * (k // 2) + (start // 2 + lane)[None, :],
                mask=row_inside[:, None] & inside[None, :],
                other=0,
            )
            block = start // 32 + tl.arange(0, shares)
            there = row_inside[:, None] & (block < k // 32)[None, :]
            scale, minimum = affine(scales, pairs, row[:, None], block[None, :], there, k // 32, WEIGHT)
            low, high = (stored & 15).to(tl.float32), (stored >> 4).to(tl.float32)
        else:
            at = start + lane
            inside = at < k
            low = tl.load(w + row[:, None] * k + at[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0).to(
                tl.float32
            )
            high, scale, minimum = low, low, low
            if WEIGHT == "q8_0":
                block = start // 32 + tl.arange(0, shares // 2)
                there = row_inside[:, None] & (block < k // 32)[None, :]
                scale, _ = affine(scales, pairs, row[:, None], block[None, :], there, k // 32, WEIGHT)
                scale = tl.reshape(tl.broadcast_to(scale[:, :, None], [TALL, shares // 2, 2]), [TALL, shares])
        acc0 = _add(acc0, low, high, scale, minimum, x, at, inside, WEIGHT, nibbles, LANE, shares, TALL)
        if ROWS > 1:
            acc1 = _add(acc1, low, high, scale, minimum, x1, at, inside, WEIGHT, nibbles, LANE, shares, TALL)
        if ROWS > 2:
            acc2 = _add(acc2, low, high, scale, minimum, x2, at, inside, WEIGHT, nibbles, LANE, shares, TALL)
            acc3 = _add(acc3, low, high, scale, minimum, x3, at, inside, WEIGHT, nibbles, LANE, shares, TALL)
    of_row = tl.load(scales + row, mask=row_inside, other=0.0) if WEIGHT == "fp8" else 1.0
    _finish_row(acc0, of_row, 0, tile, bias, residual, y0, y1, y2, n, end0, end1, BIAS, RESIDUAL, GATED, OUTPUTS, TALL)
    if ROWS > 1:
        _finish_row(
            acc1, of_row, 1, tile, bias, residual, y0, y1, y2, n, end0, end1, BIAS, RESIDUAL, GATED, OUTPUTS, TALL
        )
    if ROWS > 2:
        if m > 2:
            _finish_row(
                acc2, of_row, 2, tile, bias, residual, y0, y1, y2, n, end0, end1, BIAS, RESIDUAL, GATED, OUTPUTS, TALL
            )
        if m > 3:
            _finish_row(
                acc3, of_row, 3, tile, bias, residual, y0, y1, y2, n, end0, end1, BIAS, RESIDUAL, GATED, OUTPUTS, TALL
            )
