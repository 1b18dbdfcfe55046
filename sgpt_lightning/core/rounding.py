"""The last stages of a solve: a width for each channel, a grid for each row, the sweep that rounds, and the descent."""

from typing import NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.core.allocation import allocate_budget, allocate_quantile
from sgpt_lightning.core.budget import grid_kind, mean_code_bits, widest_width, width_axis
from sgpt_lightning.core.descent import descend
from sgpt_lightning.core.grids import Grid, WidthAxis, dequantize_matrix, fit_affine_grid, quantize_matrix
from sgpt_lightning.core.linear import LinearProblem, Start, sweep_columns
from sgpt_lightning.core.objective import Objective
from sgpt_lightning.core.ranges import refit_grid, search_grid
from sgpt_lightning.core.scales import ColumnScales
from sgpt_lightning.recipe import Recipe


class Rounded(NamedTuple):
    """Codes in the making."""

    stored: Tensor
    """The weights that the codes stand for, float32 `[out_features, in_features]`."""
    widths: Tensor
    grid: Grid
    drop: Tensor | None


def round_survivors(problem: LinearProblem, start: Start) -> Rounded:
    """Deal widths and round; where widths are mixed, try one width for all as well and keep the better."""
    recipe = problem.recipe
    uniform = None
    if recipe.allocation in ("uniform", "rows") or recipe.uniform_if_better:
        uniform = round_to(
            problem, start, same_width(start, widest_width(recipe, problem.shape, problem.name)), "input"
        )
    if recipe.allocation == "uniform":
        assert uniform is not None
        return _descend(problem, uniform)
    mixed = round_to(problem, start, _deal_widths(problem, start, uniform), width_axis(recipe))
    if uniform is not None and recipe.uniform_if_better:
        costs = [float(problem.row_costs(rounded.stored).sum()) for rounded in (uniform, mixed)]
        if costs[0] <= costs[1]:
            return _descend(problem, uniform)
    return _descend(problem, mixed)


def same_width(start: Start, bits: int) -> Tensor:
    """Return one width for all columns, uint8 `[in_features]`."""
    return torch.full((start.weight.shape[1],), bits, dtype=torch.uint8, device=start.weight.device)


def _deal_widths(problem: LinearProblem, start: Start, uniform: Rounded | None) -> Tensor:
    """Return the bits of each input channel, or of each output channel where rows have widths, uint8."""
    recipe, survivors, axis = problem.recipe, start.survivors, width_axis(problem.recipe)
    across = 1 if axis == "output" else 0
    if isinstance(start.mask, Tensor):
        counts = survivors.shape[across] - start.mask.sum(across)
    else:
        counts = torch.full((survivors.shape[1 - across],), survivors.shape[across], device=survivors.device)
    target = mean_code_bits(recipe, problem.shape, axis, recipe.widths, problem.name)
    if recipe.allocation == "rows":
        assert uniform is not None
        # What removal costs, no bits can mend; the survivors are fitted, so what rounding adds is the difference.
        rounding = problem.row_costs(uniform.stored) - problem.row_costs(survivors)
        return allocate_budget(rounding.clamp_min(0).sqrt(), recipe.widths, target, counts)
    if recipe.allocation == "loss":
        return allocate_budget(_sensitivity(problem.objective, survivors), recipe.widths, target, counts)
    allocate = allocate_quantile if recipe.allocation == "quantile" else allocate_budget
    return allocate(problem.importance, recipe.widths, target, counts)


def _sensitivity(objective: Objective, survivors: Tensor) -> Tensor:
    """Return sqrt(sum of squared row spans over the channel's survivors / [H^-1]_jj), float64 `[in_features]`.

    The sweep's error is sum_ij e_ij^2 / [H^-1]_jj to first order, and a rounding error e_ij is in proportion to the
    span of its row.
    """
    spans = survivors.amax(1) - survivors.amin(1)
    squared = (spans.square()[:, None] * (survivors != 0)).sum(0, dtype=torch.float64)
    return (squared / objective.input.factor.inverse_diagonal.double()).sqrt()


def round_to(problem: LinearProblem, start: Start, widths: Tensor, axis: WidthAxis) -> Rounded:
    """Fit grids for the given widths and sweep."""
    recipe, columns = problem.recipe, problem.columns
    parts, kind = recipe.solve_parts, grid_kind(recipe)
    if kind == "zero-point":
        grid = fit_affine_grid(start.survivors, int(widths.max()), recipe.group_size)._replace(axis=axis)
    else:
        diagonal = problem.objective.input.damped.diagonal()
        grid = search_grid(
            kind,
            start.survivors,
            diagonal,
            widths,
            axis=axis,
            group_size=recipe.group_size,
            search=parts.range_search,
        )
    refit_groups = kind == "zero-point" and recipe.group_size is not None and not parts.act_order
    quantizer = ColumnScales(grid, widths, start.weight.shape[1], columns.order, refit_groups)
    swept = sweep_columns(columns, start, quantizer, recipe.block_size)
    drop = columns.put_back(swept.drop) if recipe.prunes else None
    return Rounded(columns.put_back(swept.weight), widths, quantizer.grid, drop)


def _descend(problem: LinearProblem, rounded: Rounded) -> Rounded:
    """Improve codes and ranges in turn."""
    recipe, columns, objective = problem.recipe, problem.columns, problem.objective
    stored, widths, grid, drop = rounded
    damped = objective.input.damped
    for _ in range(recipe.solve_parts.descent_passes):
        descended = descend(
            columns.take(stored),
            columns.take(objective.target),
            columns.permuted(damped),
            None if drop is None else columns.take(drop),
            ColumnScales(grid, widths, stored.shape[1], columns.order),
            recipe.block_size,
        )
        codes = quantize_matrix(columns.put_back(descended), widths, grid)
        if grid.kind != "zero-point":
            grid = refit_grid(grid, codes, widths, None if drop is None else ~drop, objective.target, damped)
        stored = dequantize_matrix(codes, widths, grid)
        if drop is not None:
            stored.masked_fill_(drop, 0)
    return Rounded(stored, widths, grid, drop)


def allocation_used(recipe: Recipe, widths: Tensor) -> str:
    """Return how widths were dealt in the end."""
    assert recipe.allocation is not None
    return "uniform" if len(torch.unique(widths)) == 1 else recipe.allocation
