"""Products of e4m3 matrices by the tensor cores, their tiles brought by the bulk-copy engine (TMA).

`gemm` has one scale for a whole, or one a row of x and of W, applied to the sums; `gemm_blocks` has one for 128 columns
of a row of x and for 128 by 128 of W, applied every 128 columns. Both are persistent: as many programs as run at once
take tiles of y in turns, GROUP rows of tiles by all their columns, so that what they read stays in the L2 cache.

Each moves x and W once from memory at best, and y once; within the L2 cache x comes n / WIDE times, W m / TALL times.
Where GATED, W is gate above up, and a program has a tile of both.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _corner(tile, m, n, TALL: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile of y: GROUP rows of tiles are gone through column by column."""
    down, across = tl.cdiv(m, TALL), tl.cdiv(n, WIDE)
    group = tile // (GROUP * across)
    tall = tl.minimum(down - group * GROUP, GROUP)
    inside = tile % (GROUP * across)
    return (group * GROUP + inside % tall) * TALL, (inside // tall) * WIDE


@triton.jit
def _store(
    total, first_row, first_column, bias, residual, y, m, n,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of results, with what is added to them."""
    row = (first_row + tl.arange(0, TALL)).to(tl.int64)
    column = first_column + tl.arange(0, WIDE)
    at = row[:, None] * n + column[None, :]
    inside = (row < m)[:, None] & (column < n)[None, :]
    if BIAS:
        total += tl.load(bias + column, mask=column < n, other=0.0)[None, :]
    if RESIDUAL:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _finish(
    acc, up, first_row, first_column, bias, residual, y, m, n,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, PIECES: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Scaled sums to results; in two halves where PIECES is 2, whose way through shared memory is half as large."""
    if GATED:
        if BIAS:
            column = first_column + tl.arange(0, WIDE)
            acc += tl.load(bias + column, mask=column < n, other=0.0)[None, :]
            up += tl.load(bias + n + column, mask=column < n, other=0.0)[None, :]
        gated = acc / (1.0 + tl.exp(-acc)) * up
        _store(gated, first_row, first_column, bias, residual, y, m, n, False, RESIDUAL, TALL, WIDE)
    elif PIECES == 2:
        left, right = tl.split(tl.permute(tl.reshape(acc, [TALL, 2, WIDE // 2]), [0, 2, 1]))
        _store(left, first_row, first_column, bias, residual, y, m, n, BIAS, RESIDUAL, TALL, WIDE // 2)
        second = first_column + WIDE // 2
        _store(right, first_row, second, bias, residual, y, m, n, BIAS, RESIDUAL, TALL, WIDE // 2)
    else:
        _store(acc, first_row, first_column, bias, residual, y, m, n, BIAS, RESIDUAL, TALL, WIDE)


@triton.jit
def _scale_rows(acc, x_scales, scales, first_row, first_column, m, n, ROW: tl.constexpr):
    """Sums times the scales of their row of x and of W: one number where not ROW."""
    if ROW:
        row = first_row + tl.arange(0, acc.shape[0])
        column = first_column + tl.arange(0, acc.shape[1])
        of_x = tl.load(x_scales + row, mask=row < m, other=0.0)
        of_w = tl.load(scales + column, mask=column < n, other=0.0)
        return acc * of_x[:, None] * of_w[None, :]
    return acc * (tl.load(x_scales) * tl.load(scales))


@triton.jit
def _doubled(acc, x, w, first_row, first_column, k, DEEP: tl.constexpr, STAGES: tl.constexpr):
    """acc + the products of all columns, the sums of DEEP columns added in float32 while the next are multiplied."""
    second = tl.zeros(acc.shape, tl.float32)
    # Past the end of k both have zeros.
    for depth in tl.range(0, k, 2 * DEEP, num_stages=STAGES):
        first = tl.dot(x.load([first_row, depth]), w.load([first_column, depth]).T)
        acc += second
        # Nothing waits for this one before the next step's first.
        second = tl.dot(x.load([first_row, depth + DEEP]), w.load([first_column, depth + DEEP]).T)
        acc += first
    return acc + second


@triton.jit(do_not_specialize=["m"])
def gemm(
    x, w, x_scales, scales, bias, residual, y, m, n, k,
    ROW: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    FAST: tl.constexpr, DOUBLE: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr, PIECES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """y [m, n] = x [m, k] Wᵀ [n, k] by descriptors of tiles [TALL, DEEP] and [WIDE, DEEP], STAGES of them under way.

    x_scales [m] and scales [n] (twice that where GATED), or one number each. Unless FAST, the tensor cores' sums of
    DEEP columns are added up in float32; with DOUBLE, which is neither FAST nor GATED, while the next are made.
    """
    tiles = tl.cdiv(m, TALL) * tl.cdiv(n, WIDE)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        first_row, first_column = _corner(tile, m, n, TALL, WIDE, GROUP)
        acc = tl.zeros([TALL, WIDE], tl.float32)
        up = tl.zeros([TALL, WIDE], tl.float32)
        if DOUBLE:
            acc = _doubled(acc, x, w, first_row, first_column, k, DEEP, STAGES)
        else:
            for depth in tl.range(0, k, DEEP, num_stages=STAGES):
                rows = x.load([first_row, depth])
                if FAST:
                    acc = tl.dot(rows, w.load([first_column, depth]).T, acc)
                    if GATED:
                        up = tl.dot(rows, w.load([n + first_column, depth]).T, up)
                else:
                    acc += tl.dot(rows, w.load([first_column, depth]).T)
                    if GATED:
                        up += tl.dot(rows, w.load([n + first_column, depth]).T)
        acc = _scale_rows(acc, x_scales, scales, first_row, first_column, m, n, ROW)
        if GATED:
            up = _scale_rows(up, x_scales, scales + n, first_row, first_column, m, n, ROW)
        _finish(
            acc, up, first_row, first_column, bias, residual, y, m, n, BIAS, RESIDUAL, GATED, PIECES, TALL, WIDE
        )  # fmt: skip


@triton.jit(do_not_specialize=["m"])
def gemm_blocks(
    x, w, x_scales, scales, bias, residual, y, m, n, k,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr, PIECES: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """The same with x_scales [k/128, m] and scales [ceil(n/128), k/128]; WIDE divides 128, and where GATED 128 n.

    The sums of 128 columns are scaled and added in float32, so that a tile has two sets of sums in registers.
    """
    tiles = tl.cdiv(m, TALL) * tl.cdiv(n, WIDE)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        first_row, first_column = _corner(tile, m, n, TALL, WIDE, GROUP)
        row = first_row + tl.arange(0, TALL)
        of_columns = scales + first_column // 128 * (k // 128)
        acc = tl.zeros([TALL, WIDE], tl.float32)
        up = tl.zeros([TALL, WIDE], tl.float32)
        for block in tl.range(0, k // 128, num_stages=STAGES):
            of_x = tl.load(x_scales + block * m + row, mask=row < m, other=0.0)
            rows = x.load([first_row, block * 128])
            of_w = tl.load(of_columns + block)
            acc += tl.dot(rows, w.load([first_column, block * 128]).T) * (of_x * of_w)[:, None]
            if GATED:
                of_up = tl.load(of_columns + n // 128 * (k // 128) + block)
                up += tl.dot(rows, w.load([n + first_column, block * 128]).T) * (of_x * of_up)[:, None]
        _finish(
            acc, up, first_row, first_column, bias, residual, y, m, n, BIAS, RESIDUAL, GATED, PIECES, TALL, WIDE
        )  # fmt: skip
