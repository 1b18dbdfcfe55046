"""The loops over the columns of one tile as Triton kernels: a launch a tile, where plain torch takes six a column.

A program owns a few outputs (rows of the weight) and holds the tile's columns of them in registers, inputs first, as
`[COLUMNS, OUTPUTS]`; columns depend on each other, outputs do not. One warp a program and few outputs, so that a small
matrix fills a GPU. What the errors do to columns behind the tile is a matrix product of the caller's.

What is stored has to be what a reader of the file computes, to the last bit. So divisions are IEEE's, halves round to
even, and the compiler may not contract a product and a sum (`enable_fp_fusion=False`); the update of the running
weight, where nobody repeats the sum, asks for the fused operation by name.

Offsets into matrices are 64 bits wide. Meant for float32; masks are bytes. Importing this needs Triton.
"""

import subprocess
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST_TILE = 128
"""Columns that a program holds: 32 registers of each of its threads where it has 8 outputs."""
OUTPUTS = 8
"""Outputs of a program."""
FAILURES = (triton.TritonError, RuntimeError, OSError, subprocess.SubprocessError)
"""What a launch may raise where a GPU, a driver or the machine's C compiler is not what Triton needs."""
_KINDS = ("zero-point", "offset", "zero-free", "integer")


class Levels(NamedTuple):
    """The levels of a tile's columns; tables are float32 `[tables, out_features]`, or `[tables, 1]` for all outputs."""

    kind: str
    step: Tensor
    base: Tensor
    top: Tensor
    rows: Tensor
    """The row of the tables that a column takes, int64 `[columns]`."""


def sweep_tile(
    weight: Tensor,
    factor: Tensor,
    errors: Tensor,
    drop: Tensor | None,
    n_m: tuple[int, int] | None,
    levels: Levels | None,
) -> None:
    """Store a tile's columns one after the other, each error fed forward within the tile.

    Args:
        weight: float32 `[columns, out_features]`, contiguous; becomes what is stored.
        factor: float32 `[columns, columns]`, upper triangular, any strides.
        errors: like `weight`; written.
        drop: bool like `weight`, True where removed; written where `n_m` is given. None if nothing is removed.
        n_m: remove N of every M columns by their scores when they are reached.
        levels: what survivors are rounded to; None to leave them.

    Raises:
        ValueError: `weight`, `errors` or `drop` are not contiguous.
    """
    _check_contiguous(weight=weight, errors=errors, drop=drop)
    columns, outputs = weight.shape
    if outputs == 0:
        return
    n, m = n_m or (0, 0)
    _sweep[(triton.cdiv(outputs, OUTPUTS),)](
        weight,
        factor,
        errors,
        weight if drop is None else drop.view(torch.uint8),
        *_tables(levels, weight),
        columns,
        outputs,
        *factor.stride(),
        KIND=_kind(levels),
        MASKED=drop is not None,
        N=n,
        M=m,
        **_options(columns),
    )


def descend_tile(
    weight: Tensor, pull: Tensor, hessian: Tensor, moves: Tensor, drop: Tensor | None, levels: Levels
) -> None:
    """Take each code of a tile's columns to its best level, one column after the other.

    Args:
        weight: what is stored, float32 `[columns, out_features]`, contiguous; improved.
        pull: minus half the gradient, like `weight`; read only.
        hessian: float32 `[columns, columns]`, any strides.
        moves: like `weight`; written.
        drop: bool like `weight`, True where removed; None if nothing is.
        levels: what the codes stand for.

    Raises:
        ValueError: a matrix like `weight` is not contiguous.
    """
    _check_contiguous(weight=weight, pull=pull, moves=moves, drop=drop)
    columns, outputs = weight.shape
    if outputs == 0:
        return
    _descent[(triton.cdiv(outputs, OUTPUTS),)](
        weight,
        pull,
        hessian,
        moves,
        weight if drop is None else drop.view(torch.uint8),
        *_tables(levels, weight),
        columns,
        outputs,
        *hessian.stride(),
        KIND=_kind(levels),
        MASKED=drop is not None,
        **_options(columns),
    )


def _check_contiguous(**matrices: Tensor | None) -> None:
    for name, matrix in matrices.items():
        if matrix is not None and not matrix.is_contiguous():
            raise ValueError(f"{name} of a tile is not contiguous: strides {matrix.stride()}")


def _kind(levels: Levels | None) -> int:
    return 0 if levels is None else 1 + _KINDS.index(levels.kind)


def _tables(levels: Levels | None, weight: Tensor) -> list[Any]:
    """Return the tables and their strides, as the kernels take them."""
    if levels is None:
        return [weight, weight, weight, weight, 0, 0, 0, 0, 0, 0]
    tables = [table.expand(-1, weight.shape[1]) for table in (levels.step, levels.base, levels.top)]
    return [*tables, levels.rows, *(stride for table in tables for stride in table.stride())]


def _options(columns: int) -> dict[str, Any]:
    held = max(triton.next_power_of_2(columns), 16)
    return {"COLUMNS": held, "OUTPUTS": OUTPUTS, "num_warps": 1, "enable_fp_fusion": False}


@triton.jit
def _column(tile, column, i):
    """Column i of a tile: its bits added to zeros, so that -0 stays -0."""
    bits = tile.to(tl.int32, bitcast=True)
    return tl.sum(tl.where((column == i)[:, None], bits, 0), axis=0).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(x):
    """Nearest whole number, halves to even: from 2^23 on there are no others, below it an addition rounds so."""
    size = tl.abs(x)
    size = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    return _with_sign(size, x)


@triton.jit
def _with_sign(size, x):
    bits = (size.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | (x.to(tl.int32, bitcast=True) & -0x80000000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _clamped(steps, top):
    return tl.minimum(tl.maximum(steps, 0.0), top)


@triton.jit
def _nearest(x, step, base, top, KIND: tl.constexpr):
    """Nearest level, by the operations of `grids.Scale.nearest` in their order."""
    if KIND == 1:
        level = (_clamped(_rounded(tl.div_rn(x, step)) + base, top) - base) * step
    elif KIND == 2:
        level = _clamped(_rounded(tl.div_rn(x - base, step)), top) * step + base
    elif KIND == 3:
        level = _with_sign(_clamped(_rounded(tl.div_rn(tl.abs(x) - base, step)), top) * step + base, x)
    else:
        level = _rounded(tl.div_rn(x, step)) * step
    return level


@triton.jit
def _nearest_of_column(
    x, i, output, inside,
    step, base, top, index, step_table, step_output, base_table, base_output, top_table, top_output,
    KIND: tl.constexpr,
):  # fmt: skip
    """Nearest levels of column i, whose row of the tables is read first."""
    table = tl.load(index + i).to(tl.int64)
    unit = tl.load(step + table * step_table + output * step_output, mask=inside, other=1.0)
    first, last = unit, unit
    if KIND != 4:
        first = tl.load(base + table * base_table + output * base_output, mask=inside, other=0.0)
        last = tl.load(top + table * top_table + output * top_output, mask=inside, other=0.0)
    return _nearest(x, unit, first, last, KIND)


@triton.jit
def _lowest(tile, pivots, column, i, N: tl.constexpr, M: tl.constexpr, COLUMNS: tl.constexpr):
    """Mark the N lowest scores among columns i to i + M; of equal ones the earlier."""
    score = tl.div_rn(tile, pivots[:, None])
    score = score * score
    free = ((column >= i) & (column < i + M))[:, None] & (score == score)
    marks = tl.zeros_like(tile).to(tl.int32)
    for _ in range(N):
        low = tl.min(tl.where(free, score, float("inf")), axis=0)
        first = tl.min(tl.where(free & (score == low[None, :]), column[:, None], COLUMNS), axis=0)
        hit = column[:, None] == first[None, :]
        marks = tl.where(hit, 1, marks)
        free = free & (column[:, None] != first[None, :])
    return marks


@triton.jit
def _sweep(
    weight, factor, errors, drop,
    step, base, top, index, step_table, step_output, base_table, base_output, top_table, top_output,
    columns, outputs, factor_row, factor_column,
    KIND: tl.constexpr, MASKED: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    output = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    here, inside = column < columns, output < outputs
    both = here[:, None] & inside[None, :]
    tile = tl.load(weight + column.to(tl.int64)[:, None] * outputs + output[None, :], mask=both, other=0.0)
    row = column.to(tl.int64) * factor_column
    if M > 0:
        pivots = tl.load(factor + column.to(tl.int64) * factor_row + row, mask=here, other=1.0)
        marks = tl.zeros_like(tile).to(tl.int32)
    at = output
    line, corner = factor, factor
    for i in range(columns):
        onward = tl.load(line + row, mask=here & (column > i), other=0.0)
        pivot = tl.load(corner)
        if M > 0:  # known to the compiler; the next is not
            if i % M == 0:
                marks = tl.where((column >= i)[:, None], _lowest(tile, pivots, column, i, N, M, COLUMNS), marks)
        x = _column(tile, column, i)
        level = x
        if KIND > 0:
            level = _nearest_of_column(
                x, i, output, inside, step, base, top, index, step_table, step_output, base_table, base_output,
                top_table, top_output, KIND,
            )  # fmt: skip
        if MASKED:
            if M > 0:
                removed = tl.sum(tl.where((column == i)[:, None], marks, 0), axis=0)
                tl.store(drop + at, removed.to(tl.uint8), mask=inside)
            else:
                removed = tl.load(drop + at, mask=inside, other=0).to(tl.int32)
            level = tl.where(removed != 0, 0.0, level)
        error = tl.div_rn(x - level, pivot)
        tl.store(weight + at, level, mask=inside)
        tl.store(errors + at, error, mask=inside)
        tile = tl.fma(-onward[:, None], error[None, :], tile)
        at += outputs
        line += factor_row
        corner += factor_row + factor_column


@triton.jit
def _descent(
    weight, pull, hessian, moves, drop,
    step, base, top, index, step_table, step_output, base_table, base_output, top_table, top_output,
    columns, outputs, hessian_row, hessian_column,
    KIND: tl.constexpr, MASKED: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    output = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    here, inside = column < columns, output < outputs
    both = here[:, None] & inside[None, :]
    tile = tl.load(pull + column.to(tl.int64)[:, None] * outputs + output[None, :], mask=both, other=0.0)
    row = column.to(tl.int64) * hessian_column
    at = output
    line, corner = hessian, hessian
    for i in range(columns):
        onward = tl.load(line + row, mask=here & (column > i), other=0.0)
        pivot = tl.load(corner)
        before = tl.load(weight + at, mask=inside, other=0.0)
        x = before + _column(tile, column, i) * tl.div_rn(1.0, pivot)
        level = _nearest_of_column(
            x, i, output, inside, step, base, top, index, step_table, step_output, base_table, base_output,
            top_table, top_output, KIND,
        )  # fmt: skip
        if MASKED:
            level = tl.where(tl.load(drop + at, mask=inside, other=0) != 0, 0.0, level)
        move = level - before
        tl.store(weight + at, level, mask=inside)
        tl.store(moves + at, move, mask=inside)
        tile = tl.fma(-onward[:, None], move[None, :], tile)
        at += outputs
        line += hessian_row
        corner += hessian_row + hessian_column
