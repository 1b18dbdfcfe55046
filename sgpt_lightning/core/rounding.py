"""The last stages of a solve: a width for each channel, a grid for each row, the sweep that rounds, and the descent."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sgpt_lightning.core.allocation import allocate_budget, allocate_quantile
from sgpt_lightning.core.budget import grid_kind, mean_code_bits, widest_width, width_axis
from sgpt_lightning.core.grids import Grid, WidthAxis, dequantize_matrix, fit_affine_grid, quantize_matrix
from sgpt_lightning.core.linear import LinearProblem, Rounded, Start, descend_columns, sweep_columns
from sgpt_lightning.core.objective import Objective
from sgpt_lightning.core.ranges import refit_grid, search_grid
from sgpt_lightning.core.scales import ColumnScales
from sgpt_lightning.recipe import Recipe


def round_survivors(problems: Sequence[LinearProblem], starts: Sequence[Start]) -> list[Rounded]:
    """Deal widths and round; where widths are mixed, try one width for all as well and keep the better.

    Args:
        problems: linears that share an input and a recipe.
        starts: where each of them starts from.
    """
    recipe = problems[0].recipe
    uniform: list[Rounded] | None = None
    if recipe.allocation in ("uniform", "rows") or recipe.uniform_if_better:
        widest = [widest_width(recipe, problem.shape, problem.name) for problem in problems]
        widths = [same_width(start, bits) for start, bits in zip(starts, widest, strict=True)]
        uniform = round_to(problems, starts, widths, "input")
    if recipe.allocation == "uniform":
        assert uniform is not None
        return descend_together(problems, uniform)
    widths = [
        deal_widths(problem, start, uniform[index] if uniform is not None else None)
        for index, (problem, start) in enumerate(zip(problems, starts, strict=True))
    ]
    rounded = round_to(problems, starts, widths, width_axis(recipe))
    if uniform is not None and recipe.uniform_if_better:
        rounded = list(map(_better, problems, uniform, rounded))
    return descend_together(problems, rounded)


def _better(problem: LinearProblem, uniform: Rounded, mixed: Rounded) -> Rounded:
    costs = [float(problem.row_costs(rounded.stored).sum()) for rounded in (uniform, mixed)]
    return uniform if costs[0] <= costs[1] else mixed


def same_width(start: Start, bits: int) -> Tensor:
    """Return one width for all columns, uint8 `[in_features]`."""
    return torch.full((start.weight.shape[1],), bits, dtype=torch.uint8, device=start.weight.device)


def deal_widths(problem: LinearProblem, start: Start, uniform: Rounded | None) -> Tensor:
    """Return the bits of each input channel, or of each output channel where rows have widths, uint8."""
    if problem.widths is not None:
        return problem.widths
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


def round_to(
    problems: Sequence[LinearProblem], starts: Sequence[Start], widths: Sequence[Tensor], axis: WidthAxis
) -> list[Rounded]:
    """Fit grids for the given widths, one tensor of them per linear, and sweep."""
    recipe, columns = problems[0].recipe, problems[0].columns
    refit_groups = grid_kind(recipe) == "zero-point" and recipe.group_size is not None
    refit_groups = refit_groups and not recipe.solve_parts.act_order
    scales = [
        ColumnScales(fit_grid(*linear, axis), linear[2], linear[0].shape[1], columns.order, refit_groups)
        for linear in zip(problems, starts, widths, strict=True)
    ]
    swept = sweep_columns(columns, starts, scales, recipe.block_size)
    return [
        Rounded(
            columns.put_back(result.weight),
            used,
            scale.grid,
            columns.put_back(result.drop) if recipe.prunes else None,
        )
        for result, used, scale in zip(swept, widths, scales, strict=True)
    ]


def fit_grid(problem: LinearProblem, start: Start, widths: Tensor, axis: WidthAxis) -> Grid:
    """Fit the grid that the sweep begins with."""
    recipe, kind = problem.recipe, grid_kind(problem.recipe)
    if kind == "zero-point":
        max_bits, symmetric = int(widths.max()), problem.symmetric
        return fit_affine_grid(start.survivors, max_bits, recipe.group_size, symmetric=symmetric)._replace(axis=axis)
    return search_grid(
        kind,
        start.survivors,
        problem.objective.input.damped.diagonal(),
        widths,
        axis=axis,
        group_size=recipe.group_size,
        search=recipe.solve_parts.range_search,
    )


def descend_together(problems: Sequence[LinearProblem], rounded: Sequence[Rounded]) -> list[Rounded]:
    """Improve codes and ranges in turn."""
    parts = problems[0].recipe.solve_parts
    results = list(rounded)
    for _ in range(parts.descent_passes):
        descended = descend_columns(problems, results)
        results = list(map(_refitted, problems, results, descended))
    return results


def _refitted(problem: LinearProblem, rounded: Rounded, descended: Tensor) -> Rounded:
    """Refit the ranges to new codes; `descended` are the weights that these stand for."""
    _, widths, grid, drop = rounded
    codes = quantize_matrix(descended, widths, grid)
    if grid.kind != "zero-point":
        keep = None if drop is None else ~drop
        grid = refit_grid(grid, codes, widths, keep, problem.objective.target, problem.objective.input.damped)
    stored = dequantize_matrix(codes, widths, grid)
    return Rounded(stored if drop is None else stored.masked_fill_(drop, 0), widths, grid, drop)


def allocation_used(recipe: Recipe, widths: Tensor) -> str:
    """Return how widths were dealt in the end."""
    assert recipe.allocation is not None
    return "uniform" if len(torch.unique(widths)) == 1 else recipe.allocation
