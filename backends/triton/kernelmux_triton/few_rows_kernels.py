"""Products of a few rows with a weight matrix that is read once, its numbers decoded in registers.

`dot` has the tensor cores multiply, for up to 64 rows, with the weights as the tall side; `reduce` adds the parts of a
`dot` whose columns were split. `gemv` of few_rows_gemv.py is for the fewest. WEIGHT says how W is stored:

    dense   W [n, k] float16 or bfloat16
    fp8     W [n, k] e4m3; scales [n] float32, of the whole row
    fp8_one, fp8_block: the same with one scale for all, or scales [ceil(n/128), k/128]
    q8_0    W [n, k] int8; scales [n, k/32] float16
    q4_0, q4_1   W [n, k/2] nibbles; scales [n, k/32] float16, of q4_1 pairs of scale and minimum in an int32
    q4_k    W [n, k/2] nibbles; scales [n, k/32] int16, a byte of scale and one of minimum; pairs [n, k/256] of float16
            that these are multiples of, in an int32
    int4_32, int4_64, int4_128, int4_row   W [n, k/2] nibbles; scales [n, groups] float16 or bfloat16 of so many columns
            or the whole row; pairs [n, groups] uint8, the q that stands for zero

Of 32 columns byte i, 0 to 15, has column i in its low and column 16 + i in its high nibble. Where GATED, W is gate
above up, n rows each, and a program takes the same rows of both. Where OUTPUTS is 2 or 3, W is as many matrices below
one another, whose rows end at `end0`, `end1` and n; two end at `end1`. m is the number of rows of x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernelmux_triton.e4m3 import BACK, UP, halves


@triton.jit
def _numbers(words):
    """The two float16 numbers of an int32, as float32: low, high."""
    low = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.constexpr_function
def is_nibbles(weight):
    """Whether W has two numbers a byte."""
    return weight in ("q4_0", "q4_1", "q4_k") or weight.startswith("int4_")


@triton.constexpr_function
def is_groups(weight):
    """Whether blocks share scales and zero points."""
    return weight.startswith("int4_")


@triton.constexpr_function
def blocks_of_group(weight):
    """How many blocks of 32 columns share a scale and a zero point; 0: all of a row."""
    return {"int4_32": 1, "int4_64": 2, "int4_128": 4}.get(weight, 0)


@triton.jit
def affine(scales, pairs, row, block, inside, BLOCKS, WEIGHT: tl.constexpr):
    """Scale and minimum of blocks of 32 columns: w = scale q + minimum. `row` [rows, 1], `block` [1, blocks]."""
    at = row * BLOCKS + block
    if is_groups(WEIGHT):
        shared: tl.constexpr = blocks_of_group(WEIGHT)
        at = row * (BLOCKS // shared) + block // shared if shared else row + 0 * block
    raw = tl.load(scales + at, mask=inside, other=0)
    if WEIGHT == "q4_1":
        scale, minimum = _numbers(raw)
    elif is_groups(WEIGHT):
        scale = raw.to(tl.float32)
        minimum = -scale * tl.load(pairs + at, mask=inside, other=0).to(tl.float32)
    elif WEIGHT == "q4_k":
        words = tl.load(pairs + row * (BLOCKS // 8) + block // 8, mask=inside, other=0)
        of_scales, of_minima = _numbers(words)
        scale = of_scales * (raw & 0xFF).to(tl.float32)
        minimum = -of_minima * ((raw >> 8) & 0xFF).to(tl.float32)
    else:
        scale = raw.to(tl.float32)
        minimum = -8.0 * scale if WEIGHT == "q4_0" else 0.0 * scale
    return scale, minimum


@triton.jit
def rows_of(tile, n, GATED: tl.constexpr, TALL: tl.constexpr):
    """W's rows of a program: TALL after one another, or half of them of gate and the same ones of up."""
    at = tl.arange(0, TALL)
    if GATED:
        row = tile * (TALL // 2) + at % (TALL // 2)
        return (row + (at // (TALL // 2)) * n).to(tl.int64), row < n
    row = tile * TALL + at
    return row.to(tl.int64), row < n


@triton.jit
def silu(g):
    return g / (1.0 + tl.exp(-g))


@triton.jit
def write(
    total, row, inside, x_row, bias, residual, y0, y1, y2, n, end0, end1,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Results `total` of rows `row` of W, for row `x_row` of x, with what is added to them. All broadcast together."""
    if BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0)
    if RESIDUAL:
        total += tl.load(residual + x_row * n + row, mask=inside, other=0.0).to(tl.float32)
    if OUTPUTS > 1:
        first, last = row < end0, row >= end1
        tl.store(y0 + x_row * end0 + row, total.to(y0.dtype.element_ty), mask=inside & first)
        second = y1 + x_row * (end1 - end0) + (row - end0)
        tl.store(second, total.to(y1.dtype.element_ty), mask=inside & (row >= end0) & (row < end1))
        third = y2 + x_row * (n - end1) + (row - end1)
        tl.store(third, total.to(y2.dtype.element_ty), mask=inside & last)
    else:
        tl.store(y0 + x_row * n + row, total.to(y0.dtype.element_ty), mask=inside)


@triton.jit
def _spread(numbers, TALL: tl.constexpr, BLOCKS: tl.constexpr, EACH: tl.constexpr):
    """Numbers [TALL, BLOCKS], each EACH times in its row."""
    return tl.reshape(tl.broadcast_to(numbers[:, :, None], [TALL, BLOCKS, EACH]), [TALL, BLOCKS * EACH])


@triton.jit(do_not_specialize=["m"])
def dot(
    x, x_scales, w, scales, pairs, bias, residual, y0, y1, y2, parts, m, n, k, end0, end1, span,
    WEIGHT: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    GATED: tl.constexpr, OUTPUTS: tl.constexpr, SPLIT: tl.constexpr, IMPRECISE: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr, PAIRS: tl.constexpr, ASSEMBLED: tl.constexpr,
):  # fmt: skip
    """y = x Wᵀ for 1 to ROWS (16, 32, 64) rows. Program (tile, part): TALL rows of W, `span` columns, WIDE at a time.

    SCALED says what x's scales are where it is e4m3 ("row": [m], "one", "block": [k/128, m]); else "no". Where SPLIT,
    the sums go to `parts` [splits, m, all rows of W] float32, for `reduce`. With PAIRS W is seen as int16 [n, k/2].
    Moves W and its scales once, x once a program (from the L2 cache), y once, or `parts`.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    row, row_inside = rows_of(tile, n, GATED, TALL)
    x_row = tl.arange(0, ROWS)
    x_inside = x_row < m
    acc = tl.zeros([TALL, ROWS], tl.float32)
    nibbles: tl.constexpr = is_nibbles(WEIGHT)
    held = tl.arange(0, WIDE // 2 if nibbles else WIDE)
    stop = tl.minimum(k, (part + 1) * span)
    for start in tl.range(part * span, stop, WIDE, num_stages=STAGES):
        if nibbles:
            at = start + (held // 16) * 32 + held % 16
            inside = at < stop
            stored = tl.load(
                w + row[:, None] * (k // 2) + (start // 2 + held)[None, :],
                mask=row_inside[:, None] & inside[None, :],
                other=0,
            )
            block = start // 32 + tl.arange(0, WIDE // 32)
            there = row_inside[:, None] & (block < k // 32)[None, :]
            scale, minimum = affine(scales, pairs, row[:, None], block[None, :], there, k // 32, WEIGHT)
            scale = _spread(scale, TALL, WIDE // 32, 16)
            minimum = _spread(minimum, TALL, WIDE // 32, 16)
            low = ((stored & 15).to(tl.float32) * scale + minimum).to(tl.bfloat16)
            high = ((stored >> 4).to(tl.float32) * scale + minimum).to(tl.bfloat16)
            of_rows = x + x_row[:, None].to(tl.int64) * k + at[None, :]
            there = x_inside[:, None] & inside[None, :]
            first = tl.load(of_rows, mask=there, other=0.0).to(tl.bfloat16)
            second = tl.load(of_rows + 16, mask=there, other=0.0).to(tl.bfloat16)
            acc = tl.dot(low, tl.trans(first), acc)
            acc = tl.dot(high, tl.trans(second), acc)
        elif PAIRS:
            at, pair = start + held, start // 2 + tl.arange(0, WIDE // 2)
            there = row_inside[:, None] & (pair < stop // 2)[None, :]
            first, second = halves(tl.load(w + row[:, None] * (k // 2) + pair[None, :], mask=there, other=0), ASSEMBLED)
            there = x_inside[:, None] & (at < stop)[None, :]
            rows = tl.load(x + x_row[:, None].to(tl.int64) * k + at[None, :], mask=there, other=0.0)
            rows = (rows.to(tl.float32) * UP).to(tl.bfloat16)
            even, odd = tl.split(tl.reshape(rows, [ROWS, WIDE // 2, 2]))
            acc = tl.dot(first, tl.trans(even), acc)
            acc = tl.dot(second, tl.trans(odd), acc)
        else:
            at = start + held
            inside = at < stop
            stored = tl.load(w + row[:, None] * k + at[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
            rows = tl.load(
                x + x_row[:, None].to(tl.int64) * k + at[None, :], mask=x_inside[:, None] & inside[None, :], other=0.0
            )
            if WEIGHT == "q8_0":
                block = start // 32 + tl.arange(0, WIDE // 32)
                there = row_inside[:, None] & (block < k // 32)[None, :]
                scale, _ = affine(scales, pairs, row[:, None], block[None, :], there, k // 32, WEIGHT)
                wide = (stored.to(tl.float32) * _spread(scale, TALL, WIDE // 32, 32)).to(tl.bfloat16)
                acc = tl.dot(wide, tl.trans(rows.to(tl.bfloat16)), acc)
            elif SCALED == "block":
                # WIDE is 128: one scale of a row of x, and of W's row one of its 128 rows.
                column = start // 128
                of_w = tl.load(scales + row // 128 * (k // 128) + column, mask=row_inside, other=0.0)
                of_x = tl.load(x_scales + column * m + x_row, mask=x_inside, other=0.0)
                acc += tl.dot(stored, tl.trans(rows)) * (of_w[:, None] * of_x[None, :])
            elif SCALED != "no":
                acc = tl.dot(stored, tl.trans(rows), acc, max_num_imprecise_acc=IMPRECISE)
            elif WEIGHT == "fp8":
                acc = tl.dot(stored.to(tl.bfloat16), tl.trans(rows.to(tl.bfloat16)), acc)
            else:
                acc = tl.dot(stored, tl.trans(rows.to(stored.dtype)), acc)
    if WEIGHT == "fp8" and SCALED != "block":
        acc *= tl.load(scales + row, mask=row_inside, other=0.0)[:, None]
    if PAIRS:
        acc *= BACK
    if WEIGHT == "fp8_one":
        acc *= tl.load(scales)
    if SCALED == "row":
        acc *= tl.load(x_scales + x_row, mask=x_inside, other=0.0)[None, :]
    if SCALED == "one":
        acc *= tl.load(x_scales)
    if SPLIT:
        every = 2 * n if GATED else n
        at = parts + (part.to(tl.int64) * m + x_row[None, :]) * every + row[:, None]
        tl.store(at, acc, mask=row_inside[:, None] & x_inside[None, :])
    else:
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(acc, [2, TALL // 2, ROWS]), [1, 2, 0]))
            row = (tile * (TALL // 2) + tl.arange(0, TALL // 2)).to(tl.int64)
            if BIAS:
                gate += tl.load(bias + row, mask=row < n, other=0.0)[:, None]
                up += tl.load(bias + n + row, mask=row < n, other=0.0)[:, None]
            inside = (row < n)[:, None] & x_inside[None, :]
            write(
                silu(gate) * up, row[:, None], inside, x_row[None, :], bias, residual, y0, y1, y2, n, 0, 0,
                False, RESIDUAL, 1,
            )  # fmt: skip
        else:
            inside = row_inside[:, None] & x_inside[None, :]
            write(
                acc, row[:, None], inside, x_row[None, :], bias, residual, y0, y1, y2, n, end0, end1,
                BIAS, RESIDUAL, OUTPUTS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["m"])
def reduce(
    parts, bias, residual, y0, y1, y2, m, n, end0, end1,
    SPLITS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, OUTPUTS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The SPLITS parts [m, rows of W] of `dot`, added in their order. Program (tile, row of x): WIDE rows of W.

    Reads `parts`, which the L2 cache still has, and writes y.
    """
    row = (tl.program_id(0) * WIDE + tl.arange(0, WIDE)).to(tl.int64)
    x_row = tl.program_id(1).to(tl.int64)
    inside = row < n
    every = 2 * n if GATED else n
    total = tl.zeros([WIDE], tl.float32)
    up = tl.zeros([WIDE], tl.float32)
    for part in tl.static_range(SPLITS):
        at = parts + (part * m + x_row) * every + row
        total += tl.load(at, mask=inside, other=0.0)
        if GATED:
            up += tl.load(at + n, mask=inside, other=0.0)
    if GATED:
        if BIAS:
            total += tl.load(bias + row, mask=inside, other=0.0)
            up += tl.load(bias + n + row, mask=inside, other=0.0)
        write(silu(total) * up, row, inside, x_row, bias, residual, y0, y1, y2, n, 0, 0, False, RESIDUAL, 1)
    else:
        write(total, row, inside, x_row, bias, residual, y0, y1, y2, n, end0, end1, BIAS, RESIDUAL, OUTPUTS)
