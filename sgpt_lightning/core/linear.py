"""One linear on its way through a solve: its objective and settings, and where the rounding starts from."""

from typing import NamedTuple

import torch
from torch import Tensor

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

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return (self.objective.target.shape[0], self.objective.target.shape[1])

    def row_costs(self, stored: Tensor) -> Tensor:
        """Return each row's share of the weighted error, float64 `[out_features]`."""
        residual = self.objective.target - stored
        errors = (residual @ self.objective.input.damped * residual).sum(1, dtype=torch.float64)
        return errors * self.row_weights


def sweep_columns(columns: Columns, start: Start, quantizer: ColumnScales | None, block_size: int) -> Swept:
    """Run the column sweep from a start; grids in the loop's order, or None to leave the survivors unrounded."""
    mask = columns.take(start.mask) if isinstance(start.mask, Tensor) else start.mask
    return sweep(columns.take(start.weight), columns.factor.hinv_chol, mask, quantizer, block_size)


def relative_weights(row_weights: Tensor | None, weight: Tensor) -> Tensor:
    """Return row weights with mean 1, float32 `[out_features]`; no row counts less than a thousandth of the mean."""
    if row_weights is None:
        return torch.ones(len(weight), device=weight.device)
    weights = row_weights.to(device=weight.device, dtype=torch.float32)
    return (weights / weights.mean().clamp_min(torch.finfo(torch.float32).tiny)).clamp_min(1e-3)
