"""One linear: mask, widths and codes in one solve.

The order of things, where a part that the recipe switches off is left out (`Parts`):

1. the objective: Hessian around the mean, target between the weight and the best answer (`objective.py`);
2. the mask: chosen by ADMM (`masks.py`) or by a sweep, survivors refitted to it (`refit.py`);
3. a width for each channel, paid for by its survivors (`allocation.py`);
4. a grid for each row (`grids.py`, `ranges.py`);
5. the sweep that rounds, columns in act order (`sweep.py`);
6. descent over the codes and ranges refitted, in turn.

With all parts off this is the published SparseGPT: the mask is chosen inside the sweep that rounds, block by block, and
a row's range is that of the whole row. Where the mask must be known before (mixed widths, act order with N:M
groups, or a refit) a sweep that only prunes chooses it.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.core.allocation import allocate_budget, allocate_quantile
from sgpt_lightning.core.budget import grid_kind, mean_code_bits, widest_width, width_axis
from sgpt_lightning.core.grids import Grid, WidthAxis, dequantize_matrix, fit_affine_grid, quantize_matrix
from sgpt_lightning.core.importance import channel_importance
from sgpt_lightning.core.masks import MaskRule, refine_mask
from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.core.objective import Objective, make_objective
from sgpt_lightning.core.problem import Columns, SharedInput
from sgpt_lightning.core.ranges import refit_grid, search_grid
from sgpt_lightning.core.refit import fit_survivors
from sgpt_lightning.core.solution import CompressedLinear, SolveError
from sgpt_lightning.core.sweep import ColumnScales, Swept, descend, sweep
from sgpt_lightning.guards import exact_float32
from sgpt_lightning.recipe import Recipe


class _Start(NamedTuple):
    """Where the rounding sweep starts from."""

    weight: Tensor
    """float32 `[out_features, in_features]`."""
    mask: MaskRule | Tensor | None
    """What is removed (bool, True where removed), how to choose it, or nothing."""

    @property
    def survivors(self) -> Tensor:
        """The weight with what is known to be removed at zero."""
        return self.weight.masked_fill(self.mask, 0) if isinstance(self.mask, Tensor) else self.weight


class _Quantized(NamedTuple):
    stored: Tensor
    """The weights that the codes stand for, float32 `[out_features, in_features]`."""
    widths: Tensor
    grid: Grid
    drop: Tensor | None


class _Problem(NamedTuple):
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


@torch.no_grad()
@exact_float32()
def compress_linear(
    weight: Tensor,
    inputs: InputStatistics | SharedInput,
    recipe: Recipe,
    name: str = "",
    storage_dtype: torch.dtype = torch.float16,
    *,
    has_bias: bool = False,
    row_weights: Tensor | None = None,
) -> CompressedLinear:
    """Prune and quantize one weight matrix against the inputs it was seen to receive.

    Args:
        weight: `[out_features, in_features]`, any floating dtype, on the device where the solve is to run.
        inputs: moments of the input, on the same device; shared where other linears receive it too.
        recipe: settings, already resolved for this linear.
        name: the linear, for error messages.
        storage_dtype: dtype of the survivors when they are not quantized.
        has_bias: whether the linear has a bias that may take over the mean of the error.
        row_weights: what a unit of squared output error costs the model's loss, `[out_features]`; equal if None.

    Raises:
        ValueError: the linear saw no token, in_features is not divisible by M of an N:M pattern, or the budget is
            below what mask, ranges and the narrowest width take.
        HessianError: the Hessian cannot be inverted.
        SolveError: the weight holds NaN or inf, or what would be stored does.
    """
    check_pattern(recipe, weight.shape[1], name)
    _check_weight(weight, name)
    objective = make_objective(
        weight.float(), inputs, recipe.solve_parts, has_bias=has_bias, damp_percent=recipe.damp_percent, name=name
    )
    shared = objective.input
    importance = channel_importance(
        objective.target, shared.statistics, shared.factor.inverse_diagonal, recipe.importance
    )
    columns = shared.act_ordered if recipe.solve_parts.act_order else shared.natural
    problem = _Problem(objective, columns, recipe, importance, _relative(row_weights, weight), name)
    start = _choose_mask(problem, shared.natural if recipe.n_m else columns)
    solved, values = None, start.weight
    if recipe.quantizes:
        solved = _quantize(problem, start)
        drop = solved.drop
    else:
        swept = _sweep(columns, start, None, recipe.block_size)
        values, drop = columns.put_back(swept.weight), columns.put_back(swept.drop) if recipe.prunes else None
    result = CompressedLinear(
        codes=None if solved is None else quantize_matrix(solved.stored, solved.widths, solved.grid),
        values=values.to(storage_dtype) if solved is None else None,
        keep=None if drop is None else ~drop,
        widths=None if solved is None else solved.widths,
        grid=None if solved is None else solved.grid,
        n_m=recipe.n_m,
        relative_error=None,
        importance_range=(float(importance.min()), float(importance.max())),
        damp_percent=columns.factor.damp_percent,
        status=shared.factor.status if columns.factor.status == "ok" else columns.factor.status,
        allocation=None if solved is None else _allocation_used(recipe, solved.widths),
    )
    stored, name = result.weight(), name or "the linear"
    if not bool(torch.isfinite(stored).all()):
        raise SolveError(
            f"{name} would be stored with NaN or inf: its weights, up to {float(weight.abs().max()):.3g}, overflow "
            f"{storage_dtype}; store in bfloat16 or float32"
        )
    error = objective.relative_error(stored)
    if not math.isfinite(error):
        raise SolveError(f"the relative error of {name} is {error}: it cannot be told how good the result is")
    return replace(result, relative_error=error, bias_shift=objective.bias_shift(stored))


class Trial(NamedTuple):
    """What a solve would cost, row by row, float64 `[out_features]` each."""

    pruning: Tensor
    """Weighted error of the survivors before they are rounded."""
    rounding: Tensor
    """What rounding to `bits` adds to it."""
    survivors: Tensor
    """Weights that are left."""


@torch.no_grad()
@exact_float32()
def try_width(
    weight: Tensor,
    inputs: InputStatistics | SharedInput,
    recipe: Recipe,
    row_weights: Tensor,
    bits: int,
    name: str = "",
) -> Trial:
    """Solve as far as is needed to know the errors that a mask and one width make; arguments as `compress_linear`."""
    _check_weight(weight, name)
    parts = replace(recipe.solve_parts, alpha=0.0, descent_passes=0)
    objective = make_objective(weight.float(), inputs, parts, has_bias=True, damp_percent=recipe.damp_percent)
    shared = objective.input
    columns = shared.act_ordered if parts.act_order else shared.natural
    importance = torch.ones(weight.shape[1], device=weight.device)
    problem = _Problem(objective, columns, recipe, importance, row_weights.float(), name)
    start = _choose_mask(problem, shared.natural if recipe.n_m else columns)
    rounded = _round_to(problem, start, _same_width(start, bits), "input")
    keep = torch.ones_like(rounded.stored) if rounded.drop is None else ~rounded.drop
    pruning = problem.row_costs(start.survivors)
    return Trial(pruning, problem.row_costs(rounded.stored) - pruning, keep.sum(1, dtype=torch.float64))


def _check_weight(weight: Tensor, name: str) -> None:
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise SolveError(f"the weight of {name or 'the linear'} holds {bad} NaN or inf of {weight.numel()} entries")


def check_pattern(recipe: Recipe, in_features: int, name: str) -> None:
    """Raise ValueError if an N:M pattern does not divide the inputs of the linear called `name`."""
    if recipe.n_m is not None and in_features % recipe.n_m[1]:
        raise ValueError(
            f"pattern {recipe.pattern} needs in_features divisible by {recipe.n_m[1]}, "
            f"but {name or 'the linear'} has {in_features}"
        )


def _sweep(columns: Columns, start: _Start, quantizer: ColumnScales | None, block_size: int) -> Swept:
    mask = columns.take(start.mask) if isinstance(start.mask, Tensor) else start.mask
    return sweep(columns.take(start.weight), columns.factor.hinv_chol, mask, quantizer, block_size)


def _relative(row_weights: Tensor | None, weight: Tensor) -> Tensor:
    """Return row weights with mean 1, float32 `[out_features]`; no row counts less than a thousandth of the mean."""
    if row_weights is None:
        return torch.ones(len(weight), device=weight.device)
    weights = row_weights.to(device=weight.device, dtype=torch.float32)
    return (weights / weights.mean().clamp_min(torch.finfo(torch.float32).tiny)).clamp_min(1e-3)


def _choose_mask(problem: _Problem, columns: Columns) -> _Start:
    """Choose the mask and fit the survivors to it, as far as that comes before the rounding sweep."""
    objective, recipe = problem.objective, problem.recipe
    if not recipe.prunes:
        return _Start(objective.target, None)
    parts, rule = recipe.solve_parts, MaskRule(recipe.zeros, recipe.n_m)
    mixed = recipe.quantizes and recipe.allocation != "uniform"
    if not (mixed or parts.mask_steps or parts.refit_steps or (parts.act_order and recipe.n_m)):
        return _Start(objective.target, rule)
    if parts.mask_steps:
        # A row's error counts by its weight, and errors are squares of weights. ADMM ends as well from what each weight
        # costs alone as from a sweep's mask (30.28 and 30.28 at 50 % on opt-mini), which takes a column loop.
        weighted = objective.target * problem.row_weights.sqrt()[:, None]
        drop = rule.removed(weighted.square() / objective.input.factor.inverse_diagonal)
        drop = refine_mask(weighted, objective.input.spectrum, drop, rule, parts.mask_steps)
    else:
        swept = _sweep(columns, _Start(objective.target, rule), None, recipe.block_size)
        drop = columns.put_back(swept.drop)
    if not parts.refit_steps:
        return _Start(objective.target, drop)
    return _Start(fit_survivors(objective.target, objective.input.damped, drop, parts.refit_steps), drop)


def _quantize(problem: _Problem, start: _Start) -> _Quantized:
    """Deal widths and round; where widths are mixed, try one width for all as well and keep the better."""
    recipe = problem.recipe
    uniform = None
    if recipe.allocation in ("uniform", "rows") or recipe.uniform_if_better:
        uniform = _round_to(
            problem, start, _same_width(start, widest_width(recipe, problem.shape, problem.name)), "input"
        )
    if recipe.allocation == "uniform":
        assert uniform is not None
        return _descend(problem, uniform)
    mixed = _round_to(problem, start, _deal_widths(problem, start, uniform), width_axis(recipe))
    if uniform is not None and recipe.uniform_if_better:
        costs = [float(problem.row_costs(rounded.stored).sum()) for rounded in (uniform, mixed)]
        if costs[0] <= costs[1]:
            return _descend(problem, uniform)
    return _descend(problem, mixed)


def _same_width(start: _Start, bits: int) -> Tensor:
    """Return one width for all columns, uint8 `[in_features]`."""
    return torch.full((start.weight.shape[1],), bits, dtype=torch.uint8, device=start.weight.device)


def _deal_widths(problem: _Problem, start: _Start, uniform: _Quantized | None) -> Tensor:
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


def _round_to(problem: _Problem, start: _Start, widths: Tensor, axis: WidthAxis) -> _Quantized:
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
    swept = _sweep(columns, start, quantizer, recipe.block_size)
    drop = columns.put_back(swept.drop) if recipe.prunes else None
    return _Quantized(columns.put_back(swept.weight), widths, quantizer.grid, drop)


def _descend(problem: _Problem, rounded: _Quantized) -> _Quantized:
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
    return _Quantized(stored, widths, grid, drop)


def _allocation_used(recipe: Recipe, widths: Tensor) -> str:
    """Return how widths were dealt in the end."""
    assert recipe.allocation is not None
    return "uniform" if len(torch.unique(widths)) == 1 else recipe.allocation
