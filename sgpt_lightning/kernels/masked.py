"""Products with masked weights in memory, and whole ones out of it, in Triton; `format/survivors.py` lays them out.

A program owns a few rows and goes along them, some words of the bitmap at a time, a lane each: the number of survivors
before a lane is a running sum of the words' counts. A lane takes its columns a few at a time, as many as have their
codes within 32 bits: these are cut out of two words once, and move down by a code wherever a bit of the bitmap is set.
For a product, x is laid out by `inputs.prepare`.

Importing this needs Triton.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgpt_lightning.kernels.columns import FAILURES as FAILURES
from sgpt_lightning.kernels.inputs import NO_RUN, lanes_of, padded, prepare
from sgpt_lightning.kernels.words import Band, Run, column_of, grid_scale, grid_value

ROWS = 4
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


def _laid_out(x: Tensor, run: MaskedRun, plain: Run, lanes: int) -> Tensor:
    """Lay out x for a run, float32 `[n, inputs]`: as for a zero-free grid, whose fields are taken by their number."""
    absent = dict.fromkeys(Band._fields)
    return prepare(
        x, Band(**absent | {"kind": 3, "columns": run.columns, "order": run.order, "group_size": 0}),  # type: ignore[arg-type]
        (plain, NO_RUN), lanes, None,
    )  # fmt: skip


def _launch(x: Tensor, out: Tensor, run: MaskedRun, product: int, n: int, out_features: int) -> None:
    absent = run.words
    plain = Run(run.bits, run.first, run.width, 0, 0)
    lanes = lanes_of([plain])
    laid = _laid_out(x, run, plain, lanes) if product else x
    _masked[(triton.cdiv(run.rows, ROWS), n)](
        laid, out, run.words, run.mask, run.starts, absent if run.order is None else run.order,
        absent if run.row_order is None else run.row_order, run.span, run.origin,
        run.rows, run.columns, run.span.shape[1], run.first, run.width, run.segment, out_features,
        padded(plain, lanes),
        ROWS=ROWS, LANES=lanes, KIND=run.kind, BITS=run.bits, WIDEST=run.widest, GROUP=run.group_size,
        ORDERED=run.order is not None, ROW_ORDERED=run.row_order is not None, PRODUCT=product,
        POPC=run.words.is_cuda and torch.version.hip is None, num_warps=WARPS, enable_fp_fusion=bool(product),
    )  # fmt: skip


@triton.jit
def _ones(mask, POPC: tl.constexpr):
    """Bits that are set; POPC is an instruction of NVIDIA's."""
    if POPC:
        ones = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [mask], dtype=tl.int32, is_pure=True, pack=1)
    else:
        pairs = mask - ((mask >> 1) & 0x55555555)
        fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
        eights = (fours + (fours >> 4)) & 0x0F0F0F0F
        sixteens = eights + (eights >> 8)
        ones = ((sixteens + (sixteens >> 16)) & 63).to(tl.int32)
    return ones


@triton.jit
def _cut(codes, place, size):
    """32 bits from a place on, uint32, of which the first `size` are wanted: no other word is read."""
    shift = place & 31
    low = tl.load(codes + (place >> 5), mask=size > 0, other=0).to(tl.uint32, bitcast=True)
    high = tl.load(codes + (place >> 5) + 1, mask=shift + size > 32, other=0).to(tl.uint32, bitcast=True)
    # In two steps: a shift by 32 is none.
    return (low >> shift) | (high << 1 << (31 - shift))


@triton.jit
def _put_sums(out, total, own, rows, row_order, ROW_ORDERED: tl.constexpr):
    """Write the sums of a program's rows."""
    row = tl.load(row_order + tl.minimum(own, rows - 1)).to(tl.int32) if ROW_ORDERED else own
    tl.store(out + row, tl.sum(total, axis=1).to(out.dtype.element_ty), mask=own < rows)


_NUMBERS = ["rows", "columns", "segments", "first", "count", "segment", "out_features", "inputs"]
_POINTERS = ["x", "out", "words", "mask", "starts", "order", "row_order", "span", "origin"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def _masked(
    x, out, words, mask, starts, order, row_order, span, origin,
    rows, columns, segments, first, count, segment, out_features, inputs,
    ROWS: tl.constexpr, LANES: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, WIDEST: tl.constexpr,
    GROUP: tl.constexpr, ORDERED: tl.constexpr, ROW_ORDERED: tl.constexpr, PRODUCT: tl.constexpr,
    POPC: tl.constexpr,
):  # fmt: skip
    FIELDS: tl.constexpr = 8 if BITS <= 4 else 4
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # Rows that are not there are computed as the last one.
    number = tl.minimum(own, rows - 1)[:, None]
    row = tl.load(row_order + number).to(tl.int32) if ROW_ORDERED else number
    input = tl.program_id(1).to(tl.int64)
    into = out + row.to(tl.int64) * columns
    row_words = (count + 31) // 32
    base = mask + number.to(tl.int64) * row_words
    # Of the row's first survivor: its word, and its bit in the word.
    bit = tl.load(starts + number).to(tl.int64) * BITS
    codes = words + (bit >> 5)
    before = (bit & 31).to(tl.int32)
    if GROUP == 0:
        step, zero = grid_scale(span, origin, row, segment, segments, number >= 0, KIND, BITS, WIDEST, PRODUCT == 1)
    total = tl.zeros([ROWS, LANES], tl.float32)
    lanes = tl.arange(0, LANES)[None, :]
    x += input * inputs + lanes
    for at in range(0, row_words, LANES):
        lane = at + lanes
        word = tl.load(base + lane + number * 0, mask=lane + number * 0 < row_words, other=0)
        word = word.to(tl.uint32, bitcast=True)
        ones = _ones(word, POPC)
        place = before + (tl.cumsum(ones, axis=1) - ones) * BITS
        before += tl.sum(ones, axis=1)[:, None] * BITS
        for start in tl.range(0, 32, FIELDS):
            size = _ones(word & ((1 << FIELDS) - 1), POPC) * BITS
            buffer = _cut(codes, place, size)
            place += size
            for k in tl.static_range(FIELDS):
                survives = (word & (1 << k)) != 0
                code = buffer & ((1 << BITS) - 1)
                if GROUP > 0 or PRODUCT == 0:
                    column = first + column_of(start + k, lane, count)
                    if ORDERED:
                        column = tl.load(order + column, mask=survives, other=0).to(tl.int32)
                if GROUP > 0:
                    step, zero = grid_scale(span, origin, row, column // GROUP, segments, survives, KIND, BITS, WIDEST)
                value = grid_value(code, step, zero, KIND, BITS)
                if PRODUCT == 1:
                    total += tl.where(survives, value, 0.0) * tl.load(x + k * LANES)
                else:
                    there = survives & (own[:, None] < rows)
                    tl.store(into + column, value.to(out.dtype.element_ty), mask=there)
                buffer = tl.where(survives, buffer >> BITS, buffer)
            word = word >> FIELDS
            x += FIELDS * LANES
    if PRODUCT == 1:
        _put_sums(out + input * out_features, total, own, rows, row_order, ROW_ORDERED)
