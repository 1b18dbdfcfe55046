"""Products with weights that lie in memory as fields of 32-bit words, in Triton; `format/planes.py` draws the words.

A first launch lays out x as the fields lie (`inputs.py`). Then a program owns a few rows of the weight, all of their
columns, and takes some lanes of them at a time: neighbouring threads read neighbouring words, all of a lane's words at
once, and cut them where it is known when the kernel is compiled; each input is read once for all rows of a thread. What
a column's codes are multiplied with is in x, what a row's are goes into the sum; zero points and offsets are multiplied
with sums of x. Sums are in float32, always in the same order.

Importing this needs Triton.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgpt_lightning.kernels.columns import FAILURES as FAILURES
from sgpt_lightning.kernels.inputs import NO_RUN, lanes_of, padded, prepare
from sgpt_lightning.kernels.sums import apart_sums, run_sums
from sgpt_lightning.kernels.words import Band as Band
from sgpt_lightning.kernels.words import Run as Run
from sgpt_lightning.kernels.words import is_looped, pointers

MOST_INPUTS = 4
"""Rows of x of a program that has more than one: for eight Triton compiles four times as long."""
ROWS = {1: 2, MOST_INPUTS: 4}
"""Rows of a thread, by the rows of x that it multiplies with."""
WARPS, CODED_WARPS = 2, 8
"""Warps of a program. On an H100 one row of x times 4096 x 4096 weights of 4 bits took 10.6 us with 2 warps
(15.7 with 4, 11.8 with 8), coded ones of 4.3 bits 18.6 with 8 (21.8 with 2, 21.1 with 4)."""


def matvec(x: Tensor, bands: list[Band], out_features: int) -> Tensor:
    """Multiply x with the transposed weight.

    Args:
        x: float `[n, in_features]`, contiguous, n from 1 to 8.
        bands: all rows of the weight, each in one of them.
        out_features: their number.

    Returns:
        `[n, out_features]`, in the dtype of x.
    """
    out = torch.empty(len(x), out_features, dtype=x.dtype, device=x.device)
    for band in bands:
        launches = _launches(band)
        carry = torch.empty(out.shape, device=x.device) if len(launches) > 1 else out
        plain = torch.empty(x.shape, device=x.device) if band.apart is not None and len(band.apart) > 0 else None
        for number, runs in enumerate(launches):
            lanes = lanes_of(runs)
            laid = prepare(x, band, runs, lanes, plain)
            last = number == len(launches) - 1
            _launch(laid, plain if last else None, out if last else carry, carry, band, (*runs, lanes), number)
    return out


def _launches(band: Band) -> list[tuple[Run, Run]]:
    """Deal the runs to launches.

    Two widths are always launched as the same pair, of which one may be absent, so that all weights of a model share
    four kernels: Triton takes seconds to compile each. A run that is looped over is alone, as it takes many registers,
    and so is the only one of a band.
    """
    if len(band.runs) == 1:
        return [(band.runs[0], NO_RUN)]
    unrolled = {run.bits: run for run in band.runs if not is_looped(band, run)}
    launches = [
        (unrolled.get(wide, _absent(wide)), unrolled.get(wide - 1, _absent(wide - 1)))
        for wide in (8, 6, 4, 2)
        if wide in unrolled or wide - 1 in unrolled
    ]
    return launches + [(run, NO_RUN) for run in band.runs if is_looped(band, run)]


def _absent(bits: int) -> Run:
    return NO_RUN._replace(bits=bits)


def rows_of(lanes: int, rows: int, warps: int) -> int:
    """Return the rows of a program whose threads have some each, a piece being some lanes."""
    return max(rows * warps * 32 // lanes, 1)


def _launch(
    laid: Tensor, plain: Tensor | None, out: Tensor, carry: Tensor, band: Band, piece: tuple[Run, Run, int], number: int
) -> None:
    """Launch the product with two runs in pieces of some lanes; from the second launch on, the carry is added."""
    first, second, lanes = piece
    inputs = 1 if len(out) == 1 else MOST_INPUTS
    warps = CODED_WARPS if band.kind == 0 else WARPS
    rows = rows_of(lanes, ROWS[inputs], warps)
    numbers: list[Any] = [band.rows, band.columns, 0 if band.span is None else band.span.shape[1], len(out)]
    numbers += [out.shape[1], number, 0 if plain is None else 1, laid.shape[1], padded(first, lanes)]
    _matvec[(triton.cdiv(band.rows, rows), triton.cdiv(len(out), inputs))](
        laid, laid if plain is None else plain, out, carry, *pointers(band), *numbers, *first[1:], *second[1:],
        N=inputs, ROWS=rows, LANES=lanes, KIND=band.kind, BITS1=first.bits, BITS2=second.bits, WIDEST=band.widest,
        GROUP=band.group_size, ORDERED=band.order is not None, ROW_ORDERED=band.row_order is not None,
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip


_NUMBERS = ["rows", "columns", "segments", "n", "out_features", "carried", "with_apart", "total", "second"]
_NUMBERS += [f"{name}{k}" for k in (1, 2) for name in ("first", "count", "start", "segment")]
_POINTERS = ["x", "plain", "out", "carry", "words", "order", "row_order", "column_factors", "row_factors", "span"]
_POINTERS += ["origin", "apart_at", "apart", "apart_tiles"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def _matvec(
    x, plain, out, carry, words, order, row_order, column_factors, row_factors, span, origin, apart_at, apart,
    apart_tiles, rows, columns, segments, n, out_features, carried, with_apart, total, second,
    first1, count1, start1, segment1, first2, count2, start2, segment2,
    N: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, KIND: tl.constexpr, BITS1: tl.constexpr,
    BITS2: tl.constexpr, WIDEST: tl.constexpr, GROUP: tl.constexpr, ORDERED: tl.constexpr, ROW_ORDERED: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = own < rows
    # Rows that are not there are computed as the last one.
    number = tl.minimum(own, rows - 1)
    row = tl.load(row_order + number).to(tl.int32) if ROW_ORDERED else number
    before = tl.program_id(1) * N
    x += before.to(tl.int64) * total
    a, b, c, d = run_sums(
        x, total, words, order, span, origin, number, row, columns, segments, n - before,
        first1, count1, start1, segment1, N, ROWS, LANES, KIND, BITS1, WIDEST, GROUP, ORDERED,
    )  # fmt: skip
    if BITS2 > 0:
        a2, b2, c2, d2 = run_sums(
            x + second, total, words, order, span, origin, number, row, columns, segments, n - before,
            first2, count2, start2, segment2, N, ROWS, LANES, KIND, BITS2, WIDEST, GROUP, ORDERED,
        )  # fmt: skip
        a, b, c, d = a + a2, b + b2, c + c2, d + d2
    factor = tl.load(row_factors + row) if KIND == 0 else tl.full([ROWS], 1.0, tl.float32)
    for i in tl.static_range(N):
        there = inside & (own * 0 + n > before + i)
        found = a if i == 0 else b if i == 1 else c if i == 2 else d
        input = tl.minimum(before + i, n - 1)
        if KIND == 0:
            if with_apart > 0:
                found += apart_sums(plain + input * columns, columns, apart_at, apart, apart_tiles, rows, ROWS)
        found *= factor
        place = input * out_features + row
        if carried > 0:
            found += tl.load(carry + place, mask=there, other=0.0).to(tl.float32)
        tl.store(out + place, found.to(out.dtype.element_ty), mask=there)
