"""Whole weights out of fields of 32-bit words, in Triton, to the last bit those of `format/resident.py`'s reference.

A small launch for each run says of every column where its fields are. Then a program goes along a few rows in the order
of their columns: it writes without gaps, in any dtype, and gathers words, which many of its columns share. Results are
rounded to float32 after each operation, as a reader of the file does, then to the dtype. Products and sums are kept
apart. Nothing of a run is known when the kernel is compiled, so one serves all widths.

Importing this needs Triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgpt_lightning.kernels.columns import FAILURES as FAILURES
from sgpt_lightning.kernels.words import Band as Band
from sgpt_lightning.kernels.words import Run as Run
from sgpt_lightning.kernels.words import grid_number, row_words

COLUMNS = 256
"""Columns that a program takes at a time."""
ROWS = 8
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
        places = torch.empty(4, band.columns, dtype=torch.int32, device=weight.device)
        factors = torch.empty(band.columns, device=weight.device) if band.kind == 0 else places
        _unpack_band(weight, band, places, factors)
    return weight


def _unpack_band(weight: Tensor, band: Band, places: Tensor, factors: Tensor) -> None:
    absent = band.words
    order = absent if band.order is None else band.order
    column_factors = absent if band.column_factors is None else band.column_factors
    for run in band.runs:
        _place[(triton.cdiv(run.channels, 256),)](
            places, factors, order, column_factors, band.columns, *run, KIND=band.kind, GROUP=band.group_size,
            ORDERED=band.order is not None, BLOCK=256,
        )  # fmt: skip
    span, origin = (absent if tensor is None else tensor for tensor in (band.span, band.origin))
    _unpack[(triton.cdiv(band.rows, ROWS),)](
        weight, places, factors, band.words, absent if band.row_order is None else band.row_order,
        absent if band.row_factors is None else band.row_factors, span, origin,
        band.rows, band.columns, 0 if band.span is None else band.span.shape[1],
        ROWS=ROWS, COLUMNS=COLUMNS, KIND=band.kind, WIDEST=band.widest, ROW_ORDERED=band.row_order is not None,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip


_RUN = ["columns", "bits", "first", "count", "start", "segment"]


@triton.jit(do_not_specialize=_RUN, do_not_specialize_on_alignment=["places", "factors", "order", "column_factors"])
def _place(
    places, factors, order, column_factors, columns, bits, first, count, start, segment,
    KIND: tl.constexpr, GROUP: tl.constexpr, ORDERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write four numbers for each column of a run.

    They are its first word in row 0; the words of a row; how far the next word of its lane is; and the place of the
    field in its word, its bits and the segment of the grid, in 8, 8 and 16 bits.
    """
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = own < count
    column = first + own
    if ORDERED:
        column = tl.load(order + column, mask=exists, other=0).to(tl.int32)
    lanes = count // 32
    rest = own >= lanes * 32
    j = tl.where(rest, own - lanes * 32, own // tl.maximum(lanes, 1))
    word = j * bits // 32
    place = tl.where(rest, bits * lanes + word, word * lanes + own - j * lanes)
    within = j * bits % 32
    onward = tl.where(within + bits > 32, tl.where(rest, 1, lanes), 0)
    group = column // GROUP if GROUP > 0 else segment
    tl.store(places + column, start + place, mask=exists)
    tl.store(places + columns + column, own * 0 + row_words(count, bits), mask=exists)
    tl.store(places + 2 * columns + column, onward, mask=exists)
    tl.store(places + 3 * columns + column, within | (bits << 8) | (group << 16), mask=exists)
    if KIND == 0:
        factor = tl.load(column_factors + first + own, mask=exists, other=0.0)
        tl.store(factors + column, factor, mask=exists)


_POINTERS = ["weight", "places", "factors", "words", "row_order", "row_factors", "span", "origin"]


@triton.jit(do_not_specialize=["rows", "columns", "segments"], do_not_specialize_on_alignment=_POINTERS)
def _unpack(
    weight, places, factors, words, row_order, row_factors, span, origin, rows, columns, segments,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr, WIDEST: tl.constexpr, ROW_ORDERED: tl.constexpr,
):  # fmt: skip
    own = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    # Rows that are not there are the last one, which is written more than once.
    number = tl.minimum(own, rows - 1)
    row = tl.load(row_order + number).to(tl.int32) if ROW_ORDERED else number
    into = weight + row.to(tl.int64) * columns
    for at in range(0, columns, COLUMNS):
        column = at + tl.arange(0, COLUMNS)[None, :]
        there = column < columns
        place = tl.load(places + column, mask=there, other=0)
        stride = tl.load(places + columns + column, mask=there, other=0)
        onward = tl.load(places + 2 * columns + column, mask=there, other=0)
        about = tl.load(places + 3 * columns + column, mask=there, other=1 << 8).to(tl.uint32, bitcast=True)
        shift, bits, segment = about & 255, (about >> 8) & 255, (about >> 16).to(tl.int32)
        word = words + (number.to(tl.int64) * stride + place)
        low = tl.load(word).to(tl.uint32, bitcast=True)
        high = tl.load(word + onward, mask=(onward > 0) & (row >= 0), other=0).to(tl.uint32, bitcast=True)
        # In two steps: a shift by 32 is none.
        one = tl.full(bits.shape, 1, tl.uint32)
        code = ((low >> shift) | (high << 1 << (31 - shift))) & ((one << bits) - 1)
        if KIND == 0:
            value = (code.to(tl.int32) - (one << (bits - 1)).to(tl.int32)).to(tl.float32)
            value = value * tl.load(factors + column, mask=there, other=0.0) * tl.load(row_factors + row)
        else:
            value = grid_number(code, bits, span, origin, row, segment, segments, KIND, WIDEST)
        tl.store(into + column, value.to(weight.dtype.element_ty), mask=there & (row >= 0))
