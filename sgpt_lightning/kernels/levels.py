"""The nearest level of a grid, in Triton: what `nearest` of `grids.Scale` and `scales.IntegerScale` do, in their order.

Divisions are IEEE's and halves round to even, so that a number has one nearest level on every device. Whoever compiles
this must keep products and sums apart (`enable_fp_fusion=False`).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

_KINDS = ("zero-point", "offset", "zero-free", "integer")


class Levels(NamedTuple):
    """The levels of a tile's columns; tables are float32 `[tables, out_features]`, or `[tables, 1]` for all outputs."""

    kind: str
    step: Tensor
    base: Tensor
    top: Tensor
    rows: Tensor
    """The row of the tables that a column takes, int64 `[columns]`."""


def level_kind(levels: Levels | None) -> int:
    """Return the kind as a kernel takes it; 0 where nothing is rounded."""
    return 0 if levels is None else 1 + _KINDS.index(levels.kind)


def level_tables(levels: Levels | None, weight: Tensor) -> list[Any]:
    """Return the tables and their strides as a kernel takes them; any tensor where nothing is rounded."""
    if levels is None:
        return [weight, weight, weight, weight, 0, 0, 0, 0, 0, 0]
    tables = [table.expand(-1, weight.shape[1]) for table in (levels.step, levels.base, levels.top)]
    return [*tables, levels.rows, *(stride for table in tables for stride in table.stride())]


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
    """NaN stays NaN, as in torch: a sweep that has lost its way must not end in plain codes."""
    steps = tl.maximum(steps, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(steps, top, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _nearest(x, step, base, top, KIND: tl.constexpr):
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
def nearest_of_column(
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
