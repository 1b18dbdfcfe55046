"""Products with weights that lie in memory as fields of 32-bit words, in Triton; `format/planes.py` draws the words.

A program owns a few rows of the weight and takes 32 lanes of them at a time: neighbouring threads read neighbouring
words, all of a lane's words at once, and cut them by shifts that are known when it is compiled. What a column's codes
are multiplied with goes into x, what a row's are goes into the sum; zero points and offsets are multiplied with sums of
x. Sums are in float32. Where rows are few, programs share their columns, and a second launch adds up what each found.

Importing this needs Triton.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgpt_lightning.kernels.columns import FAILURES as FAILURES
from sgpt_lightning.kernels.words import (
    Band,
    Run,
    column_of,
    field,
    grid_scale,
    grid_value,
    held_by,
    lane_words,
    pointers,
    row_words,
    small_float,
    wide_field,
)  # fmt: skip

LANES = 32
"""Lanes of a piece: as many as a warp has threads."""
ROWS = {1: 32, 2: 32, 4: 16, 8: 8}
"""Rows of a program, by the rows of x that it multiplies with, at most."""
WARPS = 4
PROGRAMS = 512
"""Programs that fill a GPU; with fewer of them, they share columns."""


class _Launch(NamedTuple):
    """One or two runs of a band, both of at most 8 bits, or a wider one."""

    band: Band
    runs: tuple[Run, ...]
    apart: bool
    splits: int

    @property
    def slices(self) -> int:
        """Sums that it leaves of each output."""
        return self.splits + self.apart


def matvec(x: Tensor, bands: list[Band], out_features: int) -> Tensor:
    """Multiply x with the transposed weight.

    Args:
        x: float `[n, in_features]`, contiguous, n from 1 to 8.
        bands: all rows of the weight, each in one of them.
        out_features: their number.

    Returns:
        `[n, out_features]`, in the dtype of x.
    """
    inputs = triton.next_power_of_2(len(x))
    out = torch.empty(len(x), out_features, dtype=x.dtype, device=x.device)
    for band in bands:
        launches = _launches(band, ROWS[inputs])
        slices = sum(launch.slices for launch in launches)
        sums = out if slices == 1 else torch.empty(slices, len(x), out_features, device=x.device)
        done = 0
        for launch in launches:
            _launch(x, sums if slices == 1 else sums[done:], launch, out_features, inputs)
            done += launch.slices
        if slices > 1:
            row_order = x if band.row_order is None else band.row_order
            _add[(triton.cdiv(band.rows, 128), len(x))](
                sums, out, row_order, band.rows, out_features, len(x), slices, band.row_order is not None, 128
            )
    return out


def _launches(band: Band, rows: int) -> list[_Launch]:
    """Deal the runs to launches: two at a time, wide ones alone."""
    narrow = [run for run in band.runs if run.bits <= 8]
    groups = [tuple(narrow[at : at + 2]) for at in range(0, len(narrow), 2)]
    groups += [(run,) for run in band.runs if run.bits > 8]
    wanted = triton.cdiv(PROGRAMS, triton.cdiv(band.rows, rows))
    apart = band.apart is not None and len(band.apart) > 0
    return [
        _Launch(band, group, apart and not number, min(wanted, sum(_pieces(run) for run in group)))
        for number, group in enumerate(groups)
    ]


def _pieces(run: Run) -> int:
    return triton.cdiv(triton.cdiv(run.channels, 32), LANES)


def _launch(x: Tensor, sums: Tensor, launch: _Launch, out_features: int, inputs: int) -> None:
    band, rows = launch.band, ROWS[inputs]
    first = launch.runs[0]
    second = launch.runs[1] if len(launch.runs) > 1 else Run(0, 0, 0, 0, 0)
    numbers: list[Any] = [band.rows, band.columns, 0 if band.span is None else band.span.shape[1]]
    numbers += [len(x), out_features, launch.splits, *first[1:], *second[1:]]
    _matvec[(triton.cdiv(band.rows, rows), launch.slices)](
        x, sums, *pointers(band), *numbers, first.bits,
        N=inputs, ROWS=rows, LANES=LANES, KIND=band.kind, BITS=first.bits if first.bits <= 8 else 0,
        SECOND_BITS=second.bits, WIDEST=band.widest, GROUP=band.group_size, ORDERED=band.order is not None,
        ROW_ORDERED=band.row_order is not None, APART=launch.apart, num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def _add(parts, out, row_order, rows, out_features, n, slices, ROW_ORDERED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    if ROW_ORDERED:
        row = tl.load(row_order + row, mask=inside, other=0).to(tl.int32)
    place = tl.program_id(1).to(tl.int64) * out_features + row
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(slices):
        total += tl.load(parts + place, mask=inside, other=0.0)
        parts += n * out_features
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _matvec(
    x, out, words, order, row_order, column_factors, row_factors, span, origin, apart_at, apart, apart_tiles,
    rows, columns, segments, n, out_features, splits,
    first, count, start, segment, second_first, second_count, second_start, second_segment, bits,
    N: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    SECOND_BITS: tl.constexpr, WIDEST: tl.constexpr, GROUP: tl.constexpr, ORDERED: tl.constexpr,
    ROW_ORDERED: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = number
    if ROW_ORDERED:
        row = tl.load(row_order + number, mask=number < rows, other=0).to(tl.int32)
    pieces = (count + 32 * LANES - 1) // (32 * LANES)
    if split < splits:
        if BITS == 0:
            a, b, c, d, e, f, g, h = _wide(
                x, words, order, column_factors, number, rows, columns, n, count, first, start, bits,
                split, splits, pieces, N, ROWS, LANES, ORDERED,
            )  # fmt: skip
        else:
            a, b, c, d, e, f, g, h = _run(
                x, words, order, column_factors, span, origin, number, row, rows, columns, segments, n,
                count, first, start, segment, split, splits, pieces,
                N, ROWS, LANES, KIND, BITS, WIDEST, GROUP, ORDERED,
            )  # fmt: skip
        if SECOND_BITS > 0:
            # Pieces of both runs are counted through and dealt to the programs in turn.
            begin = (split + splits - pieces % splits) % splits
            more = (second_count + 32 * LANES - 1) // (32 * LANES)
            a2, b2, c2, d2, e2, f2, g2, h2 = _run(
                x, words, order, column_factors, span, origin, number, row, rows, columns, segments, n,
                second_count, second_first, second_start, second_segment, begin, splits, more,
                N, ROWS, LANES, KIND, SECOND_BITS, WIDEST, GROUP, ORDERED,
            )  # fmt: skip
            a, b, c, d, e, f, g, h = a + a2, b + b2, c + c2, d + d2, e + e2, f + f2, g + g2, h + h2
        _store(out, row_factors, number, row, rows, n, out_features, split, a, 0, N, KIND)
        _store(out, row_factors, number, row, rows, n, out_features, split, b, 1, N, KIND)
        _store(out, row_factors, number, row, rows, n, out_features, split, c, 2, N, KIND)
        _store(out, row_factors, number, row, rows, n, out_features, split, d, 3, N, KIND)
        _store(out, row_factors, number, row, rows, n, out_features, split, e, 4, N, KIND)
        _store(out, row_factors, number, row, rows, n, out_features, split, f, 5, N, KIND)
        _store(out, row_factors, number, row, rows, n, out_features, split, g, 6, N, KIND)
        _store(out, row_factors, number, row, rows, n, out_features, split, h, 7, N, KIND)
    if APART:
        if split == splits:
            for i in range(n):
                found = _apart(
                    x + i * columns, order, column_factors, apart_at, apart, apart_tiles, rows, columns,
                    ROWS, ORDERED,
                )  # fmt: skip
                _store(
                    out + i * out_features, row_factors, number, row, rows, n, out_features, split, found, 0, N, KIND
                )


@triton.jit
def _store(
    out, row_factors, number, row, rows, n, out_features, split, found,
    INPUT: tl.constexpr, N: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Store what was found for a row of x, if there is one."""
    if INPUT < N:
        inside = (number < rows) & (number * 0 + n > INPUT)
        if KIND == 0:
            found *= tl.load(row_factors + row, mask=inside, other=0.0)
        line = (split * n + INPUT) * out_features
        tl.store(out + line.to(tl.int64) + row, found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _run(
    x, words, order, column_factors, span, origin, number, row, rows, columns, segments, n,
    count, first, start, segment, begin, splits, pieces,
    N: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    WIDEST: tl.constexpr, GROUP: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Sums over a program's columns of a run, `[ROWS]` for each row of x, without the factors of coded rows."""
    inside = number[:, None] < rows
    base = words + start + number.to(tl.int64)[:, None] * row_words(count, BITS)
    zeros, none = tl.zeros([ROWS, LANES], tl.float32), tl.zeros([1, LANES], tl.float32)
    a, b, c, d, e, f, g, h = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    sa, sb, sc, sd, se, sf, sg, sh = none, none, none, none, none, none, none, none
    # Where a row has one step, it is multiplied with the sum.
    APIECE: tl.constexpr = GROUP > 0 or KIND == 3
    half: tl.constexpr = 1 << (BITS - 1)
    step, zero = zeros, zeros
    if KIND > 0 and GROUP == 0:
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
            if GROUP > 0:
                step, zero = grid_scale(
                    span, origin, row[:, None], column // GROUP, segments, inside & exists, KIND, BITS, WIDEST
                )
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
def _wide(
    x, words, order, column_factors, number, rows, columns, n, count, first, start, bits, begin, splits, pieces,
    N: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """`_run` of coded weights, with fields of any width: seldom, so it is short rather than fast."""
    inside = number[:, None] < rows
    base = words + start + number.to(tl.int64)[:, None] * row_words(count, bits)
    zeros, none = tl.zeros([ROWS, LANES], tl.float32), tl.zeros([1, LANES], tl.float32)
    a, b, c, d, e, f, g, h = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    sa, sb, sc, sd, se, sf, sg, sh = none, none, none, none, none, none, none, none
    for piece in range(begin, pieces, splits):
        lane = (piece * LANES + tl.arange(0, LANES))[None, :]
        for j in range(32):
            exists = j < held_by(lane, count)
            place = first + column_of(j, lane, count)
            column = tl.load(order + place, mask=exists, other=0).to(tl.int32) if ORDERED else place
            factor = tl.load(column_factors + place, mask=exists, other=0.0)
            code = wide_field(base, lane, count, inside, j, bits).to(tl.int32) - (1 << (bits - 1))
            q = code.to(tl.float32)
            a, sa = _with_input(x, q, column, factor, exists, a, sa, columns, n, 0, N, 0)
            b, sb = _with_input(x, q, column, factor, exists, b, sb, columns, n, 1, N, 0)
            c, sc = _with_input(x, q, column, factor, exists, c, sc, columns, n, 2, N, 0)
            d, sd = _with_input(x, q, column, factor, exists, d, sd, columns, n, 3, N, 0)
            e, se = _with_input(x, q, column, factor, exists, e, se, columns, n, 4, N, 0)
            f, sf = _with_input(x, q, column, factor, exists, f, sf, columns, n, 5, N, 0)
            g, sg = _with_input(x, q, column, factor, exists, g, sg, columns, n, 6, N, 0)
            h, sh = _with_input(x, q, column, factor, exists, h, sh, columns, n, 7, N, 0)
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
def _apart(
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
