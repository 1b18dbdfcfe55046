"""The two column loops: the sweep that prunes and quantizes, and the descent that looks at the codes once more.

The sweep is that of SparseGPT (arXiv 2301.00774, algorithm 1) and GPTQ (arXiv 2210.17323, algorithm 1): each column is
rounded to what will be stored, and its error is fed forward to the columns that are still free through the Cholesky
factor of the inverse Hessian. Pruning only, quantizing only and both are the same loop; what differs is whether a
column loses weights and whether the rest of it is rounded to a grid.

The descent takes one code at a time, all others fixed, to the level nearest to the minimum of the true objective. The
objective is quadratic, so that level is the best one, and no step can raise the error.

Matrices are held transposed, `[in_features, out_features]`, so that a column is contiguous. No step of the loops reads
a tensor's value back to Python.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.core.grids import Grid, Scale, fit_affine_grid
from sgpt_lightning.core.masks import MaskRule, lowest, lowest_n_of_m


class ColumnScales:
    """A grid laid out for column loops: the scale of each column without reading values back.

    Args:
        grid: spans and origins.
        widths: bits per column, uint8 `[in_features]`, in the matrix's own order, or per row, uint8 `[out_features]`,
            as `grid.axis` says.
        in_features: columns of the matrix.
        order: the order in which the loop takes the columns; None for their own.
        refit_groups: fit each group's `zero-point` grid anew from the running weight when the loop reaches it, as
            GPTQ does.
    """

    def __init__(
        self,
        grid: Grid,
        widths: Tensor,
        in_features: int,
        order: Tensor | None = None,
        refit_groups: bool = False,
    ) -> None:
        self.grid = grid
        self.refit_size = grid.group_size if refit_groups else None
        segments = grid.segments(widths, in_features)
        if grid.axis == "output":
            self._bits = [0] * in_features
            self._tables = {0: _transposed(grid.at_rows(widths))}
        else:
            self._bits = (widths if order is None else widths[order]).tolist()
            self._tables = {bits: _transposed(grid.at(bits)) for bits in sorted(set(self._bits))}
        self._segments: list[int] = (segments if order is None else segments[order]).tolist()

    def scale(self, column: int) -> Scale:
        """Return the scale of one column of the loop, `[out_features]`."""
        table, segment = self._tables[self._bits[column]], self._segments[column]
        return table._replace(step=table.step[segment], base=table.base[segment])

    def reach(self, column: int, weight: Tensor) -> None:
        """Refit the group that starts at a column; `weight` is the running one, inputs first."""
        size = self.refit_size
        if size is None or column % size:
            return
        index = column // size
        fitted = fit_affine_grid(weight[column : column + size].T.contiguous(), self.grid.max_bits)
        dtype = self.grid.span.dtype
        self.grid.span[:, index] = fitted.span[:, 0].to(dtype)
        self.grid.origin[:, index] = fitted.origin[:, 0]
        for bits, table in self._tables.items():
            scale = self.grid.at(bits, slice(index, index + 1))
            table.step[index], table.base[index] = scale.step[:, 0], scale.base[:, 0]


def _transposed(scale: Scale) -> Scale:
    top = scale.top if isinstance(scale.top, int) else scale.top[:, 0].contiguous()
    return scale._replace(top=top, step=scale.step.T.contiguous(), base=scale.base.T.contiguous())


class Swept(NamedTuple):
    """Result of a loop, inputs first: `[in_features, out_features]`."""

    weight: Tensor
    drop: Tensor


def sweep(
    weight_t: Tensor,
    hinv_chol: Tensor,
    mask: MaskRule | Tensor | None,
    quantizer: ColumnScales | None,
    block_size: int,
) -> Swept:
    """Solve the columns in order, `[in_features, out_features]` in and out; see the module's docstring.

    Args:
        weight_t: float32 weights, inputs first.
        hinv_chol: upper triangular factor of the inverse Hessian, `[in_features, in_features]`.
        mask: what to remove: given (bool, True where removed), a rule, or nothing.
        quantizer: grids of the columns, in the loop's order, or None to leave survivors unrounded.
        block_size: columns per block; rounded to whole N:M groups and whole groups that are fitted on the way, so that
            all of a group has seen the same errors.
    """
    weight = weight_t.clone(memory_format=torch.contiguous_format)
    columns = weight.shape[0]
    drop = mask.clone() if isinstance(mask, Tensor) else torch.zeros_like(weight, dtype=torch.bool)
    n_m = mask.n_m if isinstance(mask, MaskRule) else None
    whole = math.lcm(n_m[1] if n_m else 1, (quantizer.refit_size if quantizer else None) or 1)
    block_size = max(block_size - block_size % whole, whole)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block, factor = weight[start:stop], hinv_chol[start:stop, start:stop]
        diagonal = factor.diagonal()
        if isinstance(mask, MaskRule) and not n_m:
            # The running total of removals is rounded, not each block's: k of the whole matrix is exact.
            size = weight.shape[1]
            k = round(mask.sparsity * (stop * size)) - round(mask.sparsity * (start * size))
            drop[start:stop] = lowest((block / diagonal[:, None]).square(), k)
        errors = torch.empty_like(block)
        for i in range(stop - start):
            if n_m and i % n_m[1] == 0:
                group = slice(i, i + n_m[1])
                drop[start:stop][group] = lowest_n_of_m((block[group] / diagonal[group, None]).square(), *n_m)
            stored = block[i]
            if quantizer is not None:
                quantizer.reach(start + i, weight)
                stored = quantizer.scale(start + i).nearest(stored)
            if mask is not None:
                stored = stored.masked_fill(drop[start + i], 0)
            torch.div(block[i] - stored, diagonal[i], out=errors[i])
            block[i] = stored
            block[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        weight[stop:].addmm_(hinv_chol[start:stop, stop:].T, errors, alpha=-1)
    return Swept(weight, drop)


def descend(
    stored_t: Tensor,
    target_t: Tensor,
    hessian: Tensor,
    drop: Tensor | None,
    quantizer: ColumnScales,
    block_size: int,
) -> Tensor:
    """Take every code once to its best level, the others fixed; all matrices inputs first.

    Args:
        stored_t: the weights that the present codes stand for, float32 `[in_features, out_features]`.
        target_t: T of the objective tr((T - Q) H (T - Q)'), same shape.
        hessian: H, damped, `[in_features, in_features]`, columns in the loop's order.
        drop: True where a weight is removed, same shape as `stored_t`; None if nothing is.
        quantizer: grids of the columns, in the loop's order.
        block_size: columns per block.

    Returns:
        The weights that the new codes stand for, `[in_features, out_features]`.
    """
    weight = stored_t.clone(memory_format=torch.contiguous_format)
    pull = hessian @ (target_t - weight)  # minus half the gradient
    diagonal = hessian.diagonal()
    for start in range(0, len(weight), block_size):
        stop = min(start + block_size, len(weight))
        moves = torch.empty_like(weight[start:stop])
        block, inside = pull[start:stop], hessian[start:stop, start:stop]
        wanted = weight[start:stop]
        inverse = 1 / diagonal[start:stop]
        for i in range(stop - start):
            value = quantizer.scale(start + i).nearest(torch.addcmul(wanted[i], block[i], inverse[i]))
            if drop is not None:
                value.masked_fill_(drop[start + i], 0)
            torch.sub(value, wanted[i], out=moves[i])
            wanted[i] = value
            block[i + 1 :].addr_(inside[i, i + 1 :], moves[i], alpha=-1)
        pull[stop:].addmm_(hessian[stop:, start:stop], moves, alpha=-1)
    return weight
