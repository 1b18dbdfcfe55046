"""One linear on its way through a solve, and the column loops over all linears that share an input."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.core.descent import descend
from sgpt_lightning.core.grids import Grid
from sgpt_lightning.core.masks import MaskRule
from sgpt_lightning.core.objective import Objective
from sgpt_lightning.core.problem import Columns
from sgpt_lightning.core.scales import ColumnScales
from sgpt_lightning.core.sweep import Swept, sweep
from sgpt_lightning.recipe import Recipe


class Start(NamedTuple):
    """Where the rounding sweep starts from."""

    weight: Tensor
    """float32 `[out_features, in_features]`."""
    mask: MaskRule | Tensor | None
    """What is removed (bool, True where removed), how to choose it, or nothing."""

    @property
    def survivors(self) -> Tensor:
        """The weight with what is known to be removed at zero."""
        return self.weight.masked_fill(self.mask, 0) if isinstance(self.mask, Tensor) else self.weight


class Rounded(NamedTuple):
    """Codes in the making."""

    stored: Tensor
    """The weights that the codes stand for, float32 `[out_features, in_features]`."""
    widths: Tensor
    """Bits per input channel, or per output channel where `grid.axis` says so, uint8."""
    grid: Grid
    drop: Tensor | None
    """True where a weight is removed, bool `[out_features, in_features]`; None if nothing is."""


class LinearProblem(NamedTuple):
    """What the steps of one solve share."""

    objective: Objective
    columns: Columns
    recipe: Recipe
    importance: Tensor
    """Score of each input channel, `[in_features]`."""
    row_weights: Tensor
    """What a unit of squared output error costs, `[out_features]`."""
    name: str
    widths: Tensor | None = None
    """Bits per input channel that are dealt already, uint8 `[in_features]`."""
    symmetric: bool = False
    """Whether min-max grids reach as far below zero as above."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return (self.objective.target.shape[0], self.objective.target.shape[1])

    def row_costs(self, stored: Tensor) -> Tensor:
        """Return each row's share of the weighted error, float64 `[out_features]`."""
        residual = self.objective.target - stored
        errors = (residual @ self.objective.input.damped * residual).sum(1, dtype=torch.float64)
        return errors * self.row_weights


def sweep_columns(
    columns: Columns, starts: Sequence[Start], scales: Sequence[ColumnScales] | None, block_size: int
) -> list[Swept]:
    """Run the column sweep from the starts of linears that share an input.

    Args:
        columns: of that input.
        starts: one per linear; all are masked in the same way.
        scales: grids in the loop's order, one per linear, or None to leave the survivors unrounded.
        block_size: columns per block.
    """
    parts = [len(start.weight) for start in starts]
    given = [start.mask for start in starts if isinstance(start.mask, Tensor)]
    swept = sweep(
        _side_by_side(columns, [start.weight for start in starts]),
        columns.factor.hinv_chol,
        _side_by_side(columns, given) if given else starts[0].mask,
        None if scales is None else ColumnScales.stacked(scales),
        block_size,
        parts,
    )
    return list(map(Swept, swept.weight.split(parts, 1), swept.drop.split(parts, 1)))


def _side_by_side(columns: Columns, matrices: Sequence[Tensor]) -> Tensor:
    """Return matrices `[out_features, in_features]` as one, inputs first and in the loop's order."""
    return columns.take(torch.cat(list(matrices)))


def descend_columns(problems: Sequence[LinearProblem], rounded: Sequence[Rounded]) -> list[Tensor]:
    """Run the descent over the codes of linears that share an input.

    Returns:
        The weights that the new codes stand for, float32 `[out_features, in_features]` each.
    """
    columns, recipe = problems[0].columns, problems[0].recipe
    drops = [drop for _, _, _, drop in rounded if drop is not None]
    scales = [ColumnScales(grid, widths, stored.shape[1], columns.order) for stored, widths, grid, _ in rounded]
    descended = descend(
        _side_by_side(columns, [stored for stored, _, _, _ in rounded]),
        _side_by_side(columns, [problem.objective.target for problem in problems]),
        columns.permuted(problems[0].objective.input.damped),
        _side_by_side(columns, drops) if drops else None,
        ColumnScales.stacked(scales),
        recipe.block_size,
    )
    parts = [len(stored) for stored, _, _, _ in rounded]
    return [columns.put_back(part) for part in descended.split(parts, 1)]


def relative_weights(row_weights: Tensor | None, weight: Tensor) -> Tensor:
    """Return row weights with mean 1, float32 `[out_features]`; no row counts less than a thousandth of the mean."""
    if row_weights is None:
        return torch.ones(len(weight), dtype=torch.float32, device=weight.device)
    weights = row_weights.to(device=weight.device, dtype=torch.float32)
    return (weights / weights.mean().clamp_min(torch.finfo(torch.float32).tiny)).clamp_min(1e-3)
