"""Products with masked weights in memory, and whole ones out of it, in Triton; `format/survivors.py` lays them out.

A program owns a few rows and goes along them, 32 words of the bitmap at a time, a lane each: the number of survivors
before a lane is a running sum of the words' counts, and where a weight's code is follows from the bits below its own.
That is a read of memory for each survivor, but neighbouring lanes read neighbouring codes.

Importing this needs Triton.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgpt_lightning.kernels.columns import FAILURES as FAILURES
from sgpt_lightning.kernels.words import column_of, grid_scale, grid_value, held_by

LANES = 32
"""Words of the bitmap that a program takes of a row at a time."""
ROWS = 8
"""Rows of a program."""
WARPS = 4


class MaskedRun(NamedTuple):
    """Columns of one width, behind a bitmap. What is absent is None."""

    kind: int
    """1 `zero-point`, 2 `offset`, 3 `zero-free`."""
    bits: int
    words: Tensor
    """int32, from its first survivor on."""
    mask: Tensor
    """int32, from its first row on: a row is a whole number of words."""
    starts: Tensor
    """int32 `[rows]`: survivors of the run before each row."""
    rows: int
    first: int
    """Position of its first column in the order."""
    width: int
    """Columns."""
    columns: int
    """in_features."""
    order: Tensor | None
    row_order: Tensor | None
    span: Tensor
    origin: Tensor
    segment: int
    group_size: int
    widest: int


def matvec(x: Tensor, runs: list[MaskedRun], out_features: int) -> Tensor:
    """Multiply x, float `[n, in_features]` and contiguous, with the transposed weight: `[n, out_features]`."""
    if len(runs) == 1 or all(run.row_order is not None for run in runs):
        out = torch.empty(len(x), out_features, dtype=x.dtype, device=x.device)
        for run in runs:
            _launch(x, out, run, 1, len(x), out_features)
        return out
    # Runs of columns: each leaves a sum of every output.
    parts = torch.empty(len(runs), len(x), out_features, device=x.device)
    for part, run in zip(parts, runs, strict=True):
        _launch(x, part, run, 1, len(x), out_features)
    return parts.sum(0).to(x.dtype)


def unpack(runs: list[MaskedRun], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Unpack a whole weight, `[out_features, in_features]` in `dtype`."""
    weight = torch.zeros(shape, dtype=dtype, device=runs[0].words.device)
    for run in runs:
        _launch(weight, weight, run, 0, 1, shape[0])
    return weight


def _launch(x: Tensor, out: Tensor, run: MaskedRun, product: int, n: int, out_features: int) -> None:
    absent = run.words
    _masked[(triton.cdiv(run.rows, ROWS), n)](
        x, out, run.words, run.mask, run.starts, absent if run.order is None else run.order,
        absent if run.row_order is None else run.row_order, run.span, run.origin,
        run.rows, run.columns, run.span.shape[1], run.first, run.width, run.segment, out_features,
        ROWS=ROWS, LANES=LANES, KIND=run.kind, BITS=run.bits, WIDEST=run.widest, GROUP=run.group_size,
        ORDERED=run.order is not None, ROW_ORDERED=run.row_order is not None, PRODUCT=product,
        num_warps=WARPS, enable_fp_fusion=bool(product),
    )  # fmt: skip


@triton.jit
def _ones(mask):
    """Bits that are set."""
    pairs = mask - ((mask >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    sixteens = eights + (eights >> 8)
    return ((sixteens + (sixteens >> 16)) & 63).to(tl.int32)


_NUMBERS = ["rows", "columns", "segments", "first", "count", "segment", "out_features"]
_POINTERS = ["x", "out", "words", "mask", "starts", "order", "row_order", "span", "origin"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def _masked(
    x, out, words, mask, starts, order, row_order, span, origin,
    rows, columns, segments, first, count, segment, out_features,
    ROWS: tl.constexpr, LANES: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, WIDEST: tl.constexpr,
    GROUP: tl.constexpr, ORDERED: tl.constexpr, ROW_ORDERED: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    number = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = number < rows
    row = number
    if ROW_ORDERED:
        row = tl.load(row_order + number, mask=inside, other=0).to(tl.int32)
    input = tl.program_id(1)
    x += input.to(tl.int64) * columns
    into = out + row.to(tl.int64) * columns
    row_words = (count + 31) // 32
    base = mask + number.to(tl.int64) * row_words
    # Of the row's first survivor: its word, and its bit in the word.
    bit = tl.load(starts + number, mask=inside, other=0).to(tl.int64) * BITS
    codes = words + (bit >> 5)
    before = (bit & 31).to(tl.int32)
    if GROUP == 0:
        step, zero = grid_scale(span, origin, row, segment, segments, inside, KIND, BITS, WIDEST)
    total = tl.zeros([ROWS, LANES], tl.float32)
    for at in range(0, row_words, LANES):
        lane = (at + tl.arange(0, LANES))[None, :]
        held = held_by(lane, count)
        word = tl.load(base + lane, mask=inside & (held > 0), other=0).to(tl.uint32, bitcast=True)
        ones = _ones(word)
        place = before + (tl.cumsum(ones, axis=1) - ones) * BITS
        before += tl.sum(ones, axis=1)[:, None] * BITS
        for j in tl.static_range(32):
            survives = ((word >> j) & 1) == 1
            exists = j < held
            position = first + column_of(j, lane, count)
            column = tl.load(order + position, mask=exists, other=0).to(tl.int32) if ORDERED else position
            code = tl.load(codes + (place >> 5), mask=survives, other=0).to(tl.uint32, bitcast=True) >> (place & 31)
            if 32 % BITS != 0:
                # In two steps: a shift by 32 is none.
                over = survives & ((place & 31) + BITS > 32)
                high = tl.load(codes + (place >> 5) + 1, mask=over, other=0).to(tl.uint32, bitcast=True)
                code |= high << 1 << (31 - (place & 31))
            code &= (1 << BITS) - 1
            if GROUP > 0:
                step, zero = grid_scale(
                    span, origin, row, column // GROUP, segments, inside & exists, KIND, BITS, WIDEST
                )
            value = tl.where(survives, grid_value(code, step, zero, KIND, BITS), 0.0)
            if PRODUCT == 1:
                total += value * tl.load(x + column, mask=exists, other=0.0).to(tl.float32)
            else:
                tl.store(into + column, value.to(out.dtype.element_ty), mask=survives)
            place += survives.to(tl.int32) * BITS
    if PRODUCT == 1:
        output = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        there = output < rows
        if ROW_ORDERED:
            output = tl.load(row_order + output, mask=there, other=0).to(tl.int32)
        place = out + input.to(tl.int64) * out_features + output
        tl.store(place, tl.sum(total, axis=1).to(out.dtype.element_ty), mask=there)
