"""Whole weights out of fields of 32-bit words, in Triton, to the last bit those of `format/resident.py`'s reference.

A program has a few rows of 32 lanes, as in `matvec.py`, and writes what it cuts at once, in any dtype: rounded to
float32 after each operation, as a reader of the file does, then to the dtype. Products and sums are kept apart.

Importing this needs Triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgpt_lightning.kernels.columns import FAILURES as FAILURES
from sgpt_lightning.kernels.words import (
    Band as Band,
)
from sgpt_lightning.kernels.words import (
    Run as Run,
)
from sgpt_lightning.kernels.words import (
    column_of,
    field,
    grid_scale,
    grid_value,
    held_by,
    is_looped,
    lane_words,
    pointers,
    row_words,
    small_float,
    wide_field,
)  # fmt: skip

LANES = 32
ROWS = 16
"""Rows of a program."""
WARPS = 4


def unpack(bands: list[Band], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Unpack a whole weight; codes that are apart are left for others to write.

    Args:
        bands: all rows of the weight, each in one of them.
        shape: (out_features, in_features).
        dtype: of the result.

    Returns:
        `[out_features, in_features]`.
    """
    weight = torch.empty(shape, dtype=dtype, device=bands[0].words.device)
    for band in bands:
        for run in band.runs:
            grid = (triton.cdiv(band.rows, ROWS), triton.cdiv(triton.cdiv(run.channels, 32), LANES))
            _unpack[grid](
                weight, *pointers(band)[:7], band.rows, band.columns, 0 if band.span is None else band.span.shape[1],
                *run[1:], ROWS=ROWS, LANES=LANES, KIND=band.kind, BITS=run.bits, LOOPED=is_looped(band, run),
                WIDEST=band.widest, GROUP=band.group_size, ORDERED=band.order is not None,
                ROW_ORDERED=band.row_order is not None, num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return weight


_NUMBERS = ["rows", "columns", "segments", "first", "count", "start", "segment"]
_POINTERS = ["weight", "words", "order", "row_order", "column_factors", "row_factors", "span", "origin"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def _unpack(
    weight, words, order, row_order, column_factors, row_factors, span, origin,
    rows, columns, segments, first, count, start, segment,
    ROWS: tl.constexpr, LANES: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, WIDEST: tl.constexpr,
    GROUP: tl.constexpr, ORDERED: tl.constexpr, ROW_ORDERED: tl.constexpr,
    LOOPED: tl.constexpr,
):  # fmt: skip
    number = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = number < rows
    row = number
    if ROW_ORDERED:
        row = tl.load(row_order + number, mask=inside, other=0).to(tl.int32)
    into = weight + row.to(tl.int64) * columns
    lane = (tl.program_id(1) * LANES + tl.arange(0, LANES))[None, :]
    held = held_by(lane, count)
    base = words + start + number.to(tl.int64) * row_words(count, BITS)
    if KIND == 0:
        row_factor = tl.load(row_factors + row, mask=inside, other=0.0)
    elif GROUP == 0:
        step, zero = grid_scale(span, origin, row, segment, segments, inside, KIND, BITS, WIDEST)
    if LOOPED:
        for j in range(32):
            exists = j < held
            place = first + column_of(j, lane, count)
            column = tl.load(order + place, mask=exists, other=0).to(tl.int32) if ORDERED else place
            code = wide_field(base, lane, count, inside, j, BITS)
            if KIND == 0:
                value = (code.to(tl.int32) - (1 << (BITS - 1))).to(tl.float32)
                value = value * tl.load(column_factors + place, mask=exists, other=0.0) * row_factor
            else:
                step, zero = grid_scale(
                    span, origin, row, column // GROUP, segments, inside & exists, KIND, BITS, WIDEST
                )
                value = grid_value(code, step, zero, KIND, BITS)
            tl.store(into + column, value.to(weight.dtype.element_ty), mask=inside & exists)
    else:
        w0, w1, w2, w3, w4, w5, w6, w7 = lane_words(base, lane, count, inside, BITS)
        for j in tl.static_range(32):
            exists = j < held
            place = first + column_of(j, lane, count)
            column = tl.load(order + place, mask=exists, other=0).to(tl.int32) if ORDERED else place
            code = field(w0, w1, w2, w3, w4, w5, w6, w7, j, BITS)
            if KIND == 0:
                value = small_float(code) - (8388608.0 + (1 << (BITS - 1)))
                value = value * tl.load(column_factors + place, mask=exists, other=0.0) * row_factor
            else:
                value = grid_value(code, step, zero, KIND, BITS)
            tl.store(into + column, value.to(weight.dtype.element_ty), mask=inside & exists)
