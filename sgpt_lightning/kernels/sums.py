"""Sums over a program's columns of weights that are fields of words, in Triton; what `matvec.py` launches.

A row of x is multiplied by each of eight variables, of which as many are used as there are rows: blocks of three
dimensions would send x through shared memory for each field.

Importing this needs Triton.
"""

import triton
import triton.language as tl

from sgpt_lightning.kernels.words import (
    column_of,
    field,
    grid_scale,
    grid_value,
    held_by,
    lane_words,
    row_words,
    small_float,
    wide_field,
)  # fmt: skip


@triton.jit
def run_sums(
    x, words, order, column_factors, span, origin, number, row, rows, columns, segments, n,
    count, first, start, segment, begin, splits, pieces,
    N: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    WIDEST: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Sums over a program's columns of a run, `[ROWS]` for each row of x, without the factors of coded rows."""
    inside = number[:, None] < rows
    base = words + start + number.to(tl.int64)[:, None] * row_words(count, BITS)
    zeros, none = tl.zeros([ROWS, LANES], tl.float32), tl.zeros([1, LANES], tl.float32)
    a, b, c, d, e, f, g, h = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    sa, sb, sc, sd, se, sf, sg, sh = none, none, none, none, none, none, none, none
    # Where a row has one step, it is multiplied with the sum.
    APIECE: tl.constexpr = KIND == 3
    half: tl.constexpr = 1 << (BITS - 1)
    step, zero = zeros, zeros
    if KIND > 0:
        step, zero = grid_scale(span, origin, row[:, None], segment, segments, inside, KIND, BITS, WIDEST)
    for piece in range(begin, pieces, splits):
        lane = (piece * LANES + tl.arange(0, LANES))[None, :]
        held = held_by(lane, count)
        w0, w1, w2, w3, w4, w5, w6, w7 = lane_words(base, lane, count, inside, BITS)
        for j in tl.static_range(32):
            code = field(w0, w1, w2, w3, w4, w5, w6, w7, j, BITS)
            exists = j < held
            place = first + column_of(j, lane, count)
            column = tl.load(order + place, mask=exists, other=0).to(tl.int32) if ORDERED else place
            factor = tl.load(column_factors + place, mask=exists, other=0.0) if KIND == 0 else none
            q = grid_value(code, step, zero, KIND, BITS) if APIECE else small_float(code) - (8388608.0 + half)
            a, sa = _with_input(x, q, column, factor, exists, a, sa, columns, n, 0, N, KIND)
            b, sb = _with_input(x, q, column, factor, exists, b, sb, columns, n, 1, N, KIND)
            c, sc = _with_input(x, q, column, factor, exists, c, sc, columns, n, 2, N, KIND)
            d, sd = _with_input(x, q, column, factor, exists, d, sd, columns, n, 3, N, KIND)
            e, se = _with_input(x, q, column, factor, exists, e, se, columns, n, 4, N, KIND)
            f, sf = _with_input(x, q, column, factor, exists, f, sf, columns, n, 5, N, KIND)
            g, sg = _with_input(x, q, column, factor, exists, g, sg, columns, n, 6, N, KIND)
            h, sh = _with_input(x, q, column, factor, exists, h, sh, columns, n, 7, N, KIND)
    a = _total(a, sa, step, zero, half, 0, N, KIND, APIECE)
    b = _total(b, sb, step, zero, half, 1, N, KIND, APIECE)
    c = _total(c, sc, step, zero, half, 2, N, KIND, APIECE)
    d = _total(d, sd, step, zero, half, 3, N, KIND, APIECE)
    e = _total(e, se, step, zero, half, 4, N, KIND, APIECE)
    f = _total(f, sf, step, zero, half, 5, N, KIND, APIECE)
    g = _total(g, sg, step, zero, half, 6, N, KIND, APIECE)
    h = _total(h, sh, step, zero, half, 7, N, KIND, APIECE)
    return a, b, c, d, e, f, g, h


@triton.jit
def _with_input(
    x, q, column, factor, exists, total, inputs, columns, n, INPUT: tl.constexpr, N: tl.constexpr, KIND: tl.constexpr
):
    """Add the products with a row of x; where there are fewer, the last one is multiplied again, and forgotten."""
    if INPUT < N:
        value = tl.load(x + tl.minimum(INPUT, n - 1) * columns + column, mask=exists, other=0.0).to(tl.float32)
        if KIND == 0:
            value *= factor
        total += q * value
        inputs += value
    return total, inputs


@triton.jit
def _total(
    total, inputs, step, zero, half: tl.constexpr, INPUT: tl.constexpr, N: tl.constexpr, KIND: tl.constexpr,
    APIECE: tl.constexpr,
):  # fmt: skip
    """Sum over lanes, `[ROWS]`, in the units of the weight; codes were less half of the codes."""
    if INPUT < N:
        if KIND == 1 and not APIECE:
            total = step * (total + (half - zero) * inputs)
        if KIND == 2 and not APIECE:
            total = step * total + (step * half + zero) * inputs
    return tl.sum(total, axis=1)


@triton.jit
def looped_sums(
    x, words, order, column_factors, span, origin, number, row, rows, columns, segments, n,
    count, first, start, begin, splits, pieces,
    N: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    WIDEST: tl.constexpr, GROUP: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """`run_sums` of wide fields, and of grids in groups: unrolled, these would not fit into registers."""
    inside = number[:, None] < rows
    base = words + start + number.to(tl.int64)[:, None] * row_words(count, BITS)
    zeros, none = tl.zeros([ROWS, LANES], tl.float32), tl.zeros([1, LANES], tl.float32)
    a, b, c, d, e, f, g, h = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    sa, sb, sc, sd, se, sf, sg, sh = none, none, none, none, none, none, none, none
    for piece in range(begin, pieces, splits):
        lane = (piece * LANES + tl.arange(0, LANES))[None, :]
        for j in range(32):
            exists = j < held_by(lane, count)
            place = first + column_of(j, lane, count)
            column = tl.load(order + place, mask=exists, other=0).to(tl.int32) if ORDERED else place
            factor = tl.load(column_factors + place, mask=exists, other=0.0) if KIND == 0 else none
            code = wide_field(base, lane, count, inside, j, BITS)
            if KIND == 0:
                q = (code.to(tl.int32) - (1 << (BITS - 1))).to(tl.float32)
            else:
                step, zero = grid_scale(
                    span, origin, row[:, None], column // GROUP, segments, inside & exists, KIND, BITS, WIDEST
                )
                q = grid_value(code, step, zero, KIND, BITS)
            a, sa = _with_input(x, q, column, factor, exists, a, sa, columns, n, 0, N, KIND)
            b, sb = _with_input(x, q, column, factor, exists, b, sb, columns, n, 1, N, KIND)
            c, sc = _with_input(x, q, column, factor, exists, c, sc, columns, n, 2, N, KIND)
            d, sd = _with_input(x, q, column, factor, exists, d, sd, columns, n, 3, N, KIND)
            e, se = _with_input(x, q, column, factor, exists, e, se, columns, n, 4, N, KIND)
            f, sf = _with_input(x, q, column, factor, exists, f, sf, columns, n, 5, N, KIND)
            g, sg = _with_input(x, q, column, factor, exists, g, sg, columns, n, 6, N, KIND)
            h, sh = _with_input(x, q, column, factor, exists, h, sh, columns, n, 7, N, KIND)
    a = _total(a, sa, zeros, zeros, 0, 0, N, 0, False)
    b = _total(b, sb, zeros, zeros, 0, 1, N, 0, False)
    c = _total(c, sc, zeros, zeros, 0, 2, N, 0, False)
    d = _total(d, sd, zeros, zeros, 0, 3, N, 0, False)
    e = _total(e, se, zeros, zeros, 0, 4, N, 0, False)
    f = _total(f, sf, zeros, zeros, 0, 5, N, 0, False)
    g = _total(g, sg, zeros, zeros, 0, 6, N, 0, False)
    h = _total(h, sh, zeros, zeros, 0, 7, N, 0, False)
    return a, b, c, d, e, f, g, h


@triton.jit
def apart_sums(
    x, order, column_factors, apart_at, apart, apart_tiles, rows, columns, ROWS: tl.constexpr, ORDERED: tl.constexpr
):
    """Sums over the codes that are beyond their fields, `[ROWS]`, with one row of x."""
    top = tl.program_id(0) * ROWS
    begin = tl.load(apart_tiles + top // 16)
    end = tl.load(apart_tiles + tl.minimum((top + ROWS + 15) // 16, (rows + 15) // 16))
    row = (top + tl.arange(0, ROWS))[:, None]
    total = tl.zeros([ROWS, 32], tl.float32)
    for at in range(begin, end, 32):
        entry = at + tl.arange(0, 32)[None, :]
        exists = entry < end
        place = tl.load(apart_at + entry, mask=exists, other=0)
        position = (place % columns).to(tl.int32)
        column = tl.load(order + position, mask=exists, other=0).to(tl.int32) if ORDERED else position
        code = tl.load(apart + entry, mask=exists, other=0).to(tl.float32)
        code *= tl.load(column_factors + position, mask=exists, other=0.0)
        code *= tl.load(x + column, mask=exists, other=0.0).to(tl.float32)
        total += tl.where((place // columns).to(tl.int32) == row, code, 0.0)
    return tl.sum(total, axis=1)
