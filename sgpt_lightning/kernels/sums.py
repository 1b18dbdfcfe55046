"""Sums over a run of columns of weights that are fields of words, in Triton; what `matvec.py` launches.

x comes from `inputs.py`. A row of it is multiplied by each of four variables, of which one is used where there is one
row: blocks of three dimensions would send x through shared memory for each field.

Importing this needs Triton.
"""

import triton
import triton.language as tl

from sgpt_lightning.kernels.words import (
    column_of,
    field,
    grid_scale,
    grid_value,
    lane_words,
    place_worth,
    placed,
    row_words,
    wide_field,
)  # fmt: skip


@triton.jit
def run_sums(
    x, total, words, order, span, origin, number, row, columns, segments, n, first, count, start, segment,
    N: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    WIDEST: tl.constexpr, GROUP: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Sums over the columns of a run, `[ROWS]` for each row of x, without the factors of coded rows."""
    base = words + start + number.to(tl.int64)[:, None] * row_words(count, BITS)
    if BITS > 8 or GROUP > 0:
        a, b, c, d = _looped_sums(
            x, total, base, order, span, origin, row, columns, segments, n, first, count,
            N, ROWS, LANES, KIND, BITS, WIDEST, GROUP, ORDERED,
        )  # fmt: skip
    else:
        step, zero = tl.full([ROWS], 1.0, tl.float32), tl.full([ROWS], 0.0, tl.float32)
        if KIND > 0:
            step, zero = grid_scale(span, origin, row, segment, segments, row >= 0, KIND, BITS, WIDEST)
        a, b, c, d = _unrolled_sums(x, total, base, step, zero, n, count, N, ROWS, LANES, KIND, BITS)
    return a, b, c, d


@triton.jit
def _unrolled_sums(
    x, total, base, step, zero, n, count,
    N: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Sums where a row has one step: it is multiplied with the sum, save for grids with a sign."""
    zeros, none = tl.zeros([ROWS, LANES], tl.float32), tl.zeros([1, LANES], tl.float32)
    a, b, c, d = zeros, zeros, zeros, zeros
    sa, sb, sc, sd = none, none, none, none
    own = tl.arange(0, LANES)[None, :]
    for piece in range(0, ((count + 31) // 32 + LANES - 1) // LANES):
        w0, w1, w2, w3, w4, w5, w6, w7 = lane_words(base, piece * LANES + own, count, BITS)
        for j in tl.static_range(32):
            if KIND == 3:
                code = field(w0, w1, w2, w3, w4, w5, w6, w7, j, BITS)
                q = grid_value(code, step[:, None], zero[:, None], KIND, BITS)
            else:
                q = placed(w0, w1, w2, w3, w4, w5, w6, w7, j, BITS)
            at = x + j * LANES + own
            a, sa = _with_input(at, q, a, sa, total, n, 0, N, KIND, j, BITS)
            b, sb = _with_input(at, q, b, sb, total, n, 1, N, KIND, j, BITS)
            c, sc = _with_input(at, q, c, sc, total, n, 2, N, KIND, j, BITS)
            d, sd = _with_input(at, q, d, sd, total, n, 3, N, KIND, j, BITS)
        x += 32 * LANES
    half: tl.constexpr = 1 << (BITS - 1)
    a = _total(a, sa, step, zero, half, 0, N, KIND)
    b = _total(b, sb, step, zero, half, 1, N, KIND)
    c = _total(c, sc, step, zero, half, 2, N, KIND)
    d = _total(d, sd, step, zero, half, 3, N, KIND)
    return a, b, c, d


@triton.jit
def _with_input(
    at, q, found, inputs, total, n, INPUT: tl.constexpr, N: tl.constexpr, KIND: tl.constexpr, J: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Add the products with a row of x; where there are fewer, the last one is multiplied again, and forgotten.

    Where the grid has an origin beside the sum, the inputs are added up as well, those of x as it was.
    """
    if INPUT < N:
        value = tl.load(at + (tl.minimum(INPUT, n - 1) * total if INPUT > 0 else 0))
        found += q * value
        if KIND == 1 or KIND == 2:
            inputs += place_worth(value, J, BITS)
    return found, inputs


@triton.jit
def _total(
    found, inputs, step, zero, half: tl.constexpr, INPUT: tl.constexpr, N: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """Sum over lanes, `[ROWS]`, in the units of the weight; codes were less half of the codes."""
    found = tl.sum(found, axis=1)
    if INPUT < N:
        if KIND == 1:
            found = step * (found + (half - zero) * tl.sum(inputs, axis=1))
        if KIND == 2:
            found = step * found + (step * half + zero) * tl.sum(inputs, axis=1)
    return found


@triton.jit
def _looped_sums(
    x, total, base, order, span, origin, row, columns, segments, n, first, count,
    N: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    WIDEST: tl.constexpr, GROUP: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Sums of wide fields, and of grids in groups: unrolled, these would not fit into registers."""
    zeros, none = tl.zeros([ROWS, LANES], tl.float32), tl.zeros([1, LANES], tl.float32)
    a, b, c, d = zeros, zeros, zeros, zeros
    own = tl.arange(0, LANES)[None, :]
    for piece in range(0, ((count + 31) // 32 + LANES - 1) // LANES):
        lane = piece * LANES + own
        for j in tl.range(0, 32, loop_unroll_factor=4):
            code = wide_field(base, lane, count, j, BITS)
            if KIND == 0:
                q = (code.to(tl.int32) - (1 << (BITS - 1))).to(tl.float32)
            else:
                # Of a lane that is not there, some column: x is 0 for it.
                column = tl.minimum(first + column_of(j, lane, count), columns - 1)
                if ORDERED:
                    column = tl.load(order + column).to(tl.int32)
                step, zero = grid_scale(
                    span, origin, row[:, None], column // GROUP, segments, row[:, None] >= 0, KIND, BITS, WIDEST, True
                )
                q = grid_value(code, step, zero, KIND, BITS)
            at = x + j * LANES + own
            a, _ = _with_input(at, q, a, none, total, n, 0, N, 0, 0, BITS)
            b, _ = _with_input(at, q, b, none, total, n, 1, N, 0, 0, BITS)
            c, _ = _with_input(at, q, c, none, total, n, 2, N, 0, 0, BITS)
            d, _ = _with_input(at, q, d, none, total, n, 3, N, 0, 0, BITS)
        x += 32 * LANES
    a, b, c, d = tl.sum(a, axis=1), tl.sum(b, axis=1), tl.sum(c, axis=1), tl.sum(d, axis=1)
    return a, b, c, d


@triton.jit
def apart_sums(x, columns, apart_at, apart, apart_tiles, rows, ROWS: tl.constexpr):
    """Sums over the codes that are beyond their fields, `[ROWS]`, with one row of x in the order of the runs."""
    top = tl.program_id(0) * ROWS
    begin = tl.load(apart_tiles + top // 16)
    end = tl.load(apart_tiles + tl.minimum((top + ROWS + 15) // 16, (rows + 15) // 16))
    row = (top + tl.arange(0, ROWS))[:, None]
    total = tl.zeros([ROWS, 128], tl.float32)
    for at in range(begin, end, 128):
        entry = at + tl.arange(0, 128)[None, :]
        exists = entry < end
        place = tl.load(apart_at + entry, mask=exists, other=0)
        code = tl.load(apart + entry, mask=exists, other=0).to(tl.float32)
        code *= tl.load(x + (place % columns).to(tl.int32), mask=exists, other=0.0)
        total += tl.where((place // columns).to(tl.int32) == row, code, 0.0)
    return tl.sum(total, axis=1)
