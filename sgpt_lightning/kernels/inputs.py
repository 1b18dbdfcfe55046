"""Rows of x as the products of packed weights read them, in Triton: a small launch before that of `matvec.py`.

A run of columns is read field by field, so x is laid out likewise: by pieces of some lanes, within a piece field by
field, a float32 for each lane. It is already in the order of the runs and multiplied with the factors of the columns,
and 0 where a lane has no such field: whatever is read there as a code counts nothing, so the loop over fields needs no
mask. Where fields are taken at the place that they have in their word, x is divided by what that place is worth, a
power of two.

Importing this needs Triton.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgpt_lightning.kernels.words import Band, Run, column_of, held_by, is_looped

CHUNK = 1024
"""Inputs of a program: a piece, however wide, is some of them."""
NO_RUN = Run(0, 0, 0, 0, 0)


def lanes_of(runs: Sequence[Run]) -> int:
    """Return the lanes of a piece: the most at which no more than a quarter of the work is for lanes not there."""
    lanes = sum(triton.cdiv(run.channels, 32) for run in runs)
    for width in (128, 64):
        if 0 < sum(padded(run, width) for run in runs) <= 1.25 * 32 * lanes:
            return width
    return 32


def padded(run: Run, lanes: int) -> int:
    """Return how many inputs a run has in pieces of some lanes, with those that are 0."""
    return triton.cdiv(run.channels, 32 * lanes) * 32 * lanes


def prepare(x: Tensor, band: Band, runs: tuple[Run, Run], lanes: int, plain: Tensor | None) -> Tensor:
    """Lay out x for some runs of a band.

    Args:
        x: float `[n, in_features]`, contiguous.
        band: rows of a weight.
        runs: two of its runs; `NO_RUN` in the place of a second.
        lanes: of a piece.
        plain: where codes are apart, float32 `[n, in_features]`. x in the order of all runs, multiplied with the
            factors of the columns, is written there, of these runs.

    Returns:
        float32 `[n, inputs]`, run behind run.
    """
    total = sum(padded(run, lanes) for run in runs)
    laid = torch.empty(len(x), total, device=x.device)
    numbers: list[Any] = [band.columns, total, lanes]
    for run in runs:
        in_place = band.kind != 3 and run.bits > 0 and not is_looped(band, run)
        numbers += [run.bits if in_place else 0, run.first, run.channels]
    numbers.append(padded(runs[0], lanes) // CHUNK)
    _prepare[(total // CHUNK, len(x))](
        x, laid, laid if plain is None else plain, x if band.order is None else band.order,
        x if band.column_factors is None else band.column_factors, *numbers,
        ORDERED=band.order is not None, FACTORS=band.kind == 0, PLAIN=plain is not None, CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip
    return laid


_NUMBERS = ["columns", "total", "lanes", "bits1", "first1", "count1", "bits2", "first2", "count2", "chunks1"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["x", "laid", "plain", "order", "factors"])
def _prepare(
    x, laid, plain, order, factors, columns, total, lanes, bits1, first1, count1, bits2, first2, count2, chunks1,
    ORDERED: tl.constexpr, FACTORS: tl.constexpr, PLAIN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    input = tl.program_id(1).to(tl.int64)
    laid += input * total + chunk * CHUNK
    bits, first, count = bits1, first1, count1
    if chunk >= chunks1:
        chunk -= chunks1
        bits, first, count = bits2, first2, count2
    own = tl.arange(0, CHUNK)
    number = chunk * CHUNK + own
    j = number // lanes % 32
    lane = number // (32 * lanes) * lanes + number % lanes
    exists = j < held_by(lane, count)
    place = first + column_of(j, lane, count)
    column = tl.load(order + place, mask=exists, other=0).to(tl.int32) if ORDERED else place
    value = tl.load(x + input * columns + column, mask=exists, other=0.0).to(tl.float32)
    if FACTORS:
        value *= tl.load(factors + place, mask=exists, other=0.0)
    if PLAIN:
        tl.store(plain + input * columns + place, value, mask=exists)
    # As `words.placed` has them.
    shift = j * bits % 32
    shift = tl.where(shift + bits <= 23, shift, tl.where(shift + bits <= 32, shift - 9, 0))
    tl.store(laid + own, value * ((127 - shift) << 23).to(tl.float32, bitcast=True))
