"""The loops over the columns of one tile in plain torch: the CPU's way, and what the kernels are tested against.

A tile is a run of columns that are solved one after the other; what its errors do to the columns behind it is one
matrix product, which is not done here. Every tensor is a view of a larger one and is written in place; matrices are
`[columns, out_features]`, square ones `[columns, columns]`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.core.masks import lowest_n_of_m
from sgpt_lightning.core.scales import ColumnScales


class SweepTile(NamedTuple):
    """What the sweep of a tile reads and writes."""

    weight: Tensor
    """The running weight; becomes what is stored."""
    factor: Tensor
    """The tile's square of the inverse Hessian's upper factor."""
    errors: Tensor
    """Written: what the columns behind the tile have to take over."""
    drop: Tensor | None
    """bool, True where removed; written where `n_m` is given. None if nothing is removed."""
    n_m: tuple[int, int] | None
    """Remove N of every M columns by their scores when they are reached; the tile starts at a group."""
    scales: ColumnScales | None
    """None to leave survivors unrounded."""
    start: int
    """The tile's first column in the loop's order."""


class DescentTile(NamedTuple):
    """What the descent over a tile reads and writes."""

    weight: Tensor
    """What is stored; improved."""
    pull: Tensor
    """Minus half the gradient of the objective; kept up to date within the tile only."""
    hessian: Tensor
    """The tile's square of the damped Hessian."""
    moves: Tensor
    """Written: by how much each weight moved."""
    drop: Tensor | None
    """bool, True where removed; None if nothing is."""
    scales: ColumnScales
    start: int
    """The tile's first column in the loop's order."""


def sweep_tile(tile: SweepTile) -> None:
    """Store the tile's columns one after the other, each error fed forward within the tile."""
    weight, factor, errors, drop, n_m, scales, start = tile
    diagonal = factor.diagonal()
    removed = None if drop is None else drop.unbind()
    columns = zip(weight.unbind(), errors.unbind(), diagonal.unbind(), strict=True)
    for i, (column, error, pivot) in enumerate(columns):
        if n_m and drop is not None and i % n_m[1] == 0:
            group = slice(i, i + n_m[1])
            drop[group] = lowest_n_of_m((weight[group] / diagonal[group, None]).square(), *n_m)
        stored = column if scales is None else scales.scale(start + i).nearest(column)
        if removed is not None:
            stored = stored.masked_fill(removed[i], 0)
        torch.div(column - stored, pivot, out=error)
        column.copy_(stored)
        weight[i + 1 :].addr_(factor[i, i + 1 :], error, alpha=-1)


def descend_tile(tile: DescentTile) -> None:
    """Take each code of the tile's columns to its best level, one column after the other."""
    weight, pull, hessian, moves, drop, scales, start = tile
    inverse = 1 / hessian.diagonal()
    columns = zip(weight.unbind(), pull.unbind(), moves.unbind(), inverse.unbind(), strict=True)
    for i, (column, force, move, reach) in enumerate(columns):
        value = scales.scale(start + i).nearest(torch.addcmul(column, force, reach))
        if drop is not None:
            value.masked_fill_(drop[i], 0)
        torch.sub(value, column, out=move)
        column.copy_(value)
        pull[i + 1 :].addr_(hessian[i, i + 1 :], move, alpha=-1)
