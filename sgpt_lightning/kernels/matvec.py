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
from sgpt_lightning.kernels.sums import apart_sums, looped_sums, run_sums
from sgpt_lightning.kernels.words import Band as Band
from sgpt_lightning.kernels.words import Run as Run
from sgpt_lightning.kernels.words import is_looped, pointers

LANES = 32
"""Lanes of a piece: as many as a warp has threads."""
ROWS = {1: 32, 2: 16, 4: 16, 8: 8}
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
                sums,
                out,
                row_order,
                band.rows,
                out_features,
                len(x),
                slices,
                band.row_order is not None,
                128,
                enable_fp_fusion=True,
            )
    return out


def _launches(band: Band, rows: int) -> list[_Launch]:
    """Deal the runs to launches: two at a time, those that are looped over alone."""
    unrolled = [run for run in band.runs if not is_looped(band, run)]
    groups = [tuple(unrolled[at : at + 2]) for at in range(0, len(unrolled), 2)]
    groups += [(run,) for run in band.runs if is_looped(band, run)]
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
        x, sums, *pointers(band), *numbers,
        N=inputs, ROWS=rows, LANES=LANES, KIND=band.kind, BITS=first.bits, LOOPED=is_looped(band, first),
        SECOND_BITS=second.bits, WIDEST=band.widest, GROUP=band.group_size, ORDERED=band.order is not None,
        ROW_ORDERED=band.row_order is not None, APART=launch.apart, num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["rows", "out_features", "n", "slices"],
    do_not_specialize_on_alignment=["parts", "out", "row_order"],
)
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


_NUMBERS = ["rows", "columns", "segments", "n", "out_features", "splits", "first", "count", "start", "segment"]
_NUMBERS += ["second_first", "second_count", "second_start", "second_segment"]
_POINTERS = ["x", "out", "words", "order", "row_order", "column_factors", "row_factors", "span", "origin"]
_POINTERS += ["apart_at", "apart", "apart_tiles"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def _matvec(
    x, out, words, order, row_order, column_factors, row_factors, span, origin, apart_at, apart, apart_tiles,
    rows, columns, segments, n, out_features, splits,
    first, count, start, segment, second_first, second_count, second_start, second_segment,
    N: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    SECOND_BITS: tl.constexpr, WIDEST: tl.constexpr, GROUP: tl.constexpr, ORDERED: tl.constexpr,
    ROW_ORDERED: tl.constexpr, APART: tl.constexpr, LOOPED: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = number
    if ROW_ORDERED:
        row = tl.load(row_order + number, mask=number < rows, other=0).to(tl.int32)
    pieces = (count + 32 * LANES - 1) // (32 * LANES)
    if split < splits:
        if LOOPED:
            a, b, c, d, e, f, g, h = looped_sums(
                x, words, order, column_factors, span, origin, number, row, rows, columns, segments, n,
                count, first, start, split, splits, pieces, N, ROWS, LANES, KIND, BITS, WIDEST, GROUP, ORDERED,
            )  # fmt: skip
        else:
            a, b, c, d, e, f, g, h = run_sums(
                x, words, order, column_factors, span, origin, number, row, rows, columns, segments, n,
                count, first, start, segment, split, splits, pieces,
                N, ROWS, LANES, KIND, BITS, WIDEST, ORDERED,
            )  # fmt: skip
        if SECOND_BITS > 0:
            # Pieces of both runs are counted through and dealt to the programs in turn.
            begin = (split + splits - pieces % splits) % splits
            more = (second_count + 32 * LANES - 1) // (32 * LANES)
            a2, b2, c2, d2, e2, f2, g2, h2 = run_sums(
                x, words, order, column_factors, span, origin, number, row, rows, columns, segments, n,
                second_count, second_first, second_start, second_segment, begin, splits, more,
                N, ROWS, LANES, KIND, SECOND_BITS, WIDEST, ORDERED,
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
                found = apart_sums(
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
