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

from sgpt_lightning.core.grids import quantize_matrix
from sgpt_lightning.core.importance import channel_importance
from sgpt_lightning.core.linear import LinearProblem, Start, relative_weights, sweep_columns
from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.core.objective import make_objective
from sgpt_lightning.core.problem import SharedInput
from sgpt_lightning.core.pruning import choose_mask
from sgpt_lightning.core.rounding import allocation_used, round_survivors, round_to, same_width
from sgpt_lightning.core.solution import CompressedLinear, SolveError
from sgpt_lightning.guards import exact_float32
from sgpt_lightning.recipe import Recipe


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
    problem = LinearProblem(objective, columns, recipe, importance, relative_weights(row_weights, weight), name)
    start = choose_mask(problem, shared.natural if recipe.n_m else columns)
    result = _rounded(problem, start) if recipe.quantizes else _pruned(problem, start, storage_dtype)
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


def _rounded(problem: LinearProblem, start: Start) -> CompressedLinear:
    """Round what the mask leaves, or choose the mask on the way, and return it as codes."""
    solved = round_survivors(problem, start)
    return replace(
        _nothing_yet(problem, solved.drop),
        codes=quantize_matrix(solved.stored, solved.widths, solved.grid),
        widths=solved.widths,
        grid=solved.grid,
        allocation=allocation_used(problem.recipe, solved.widths),
    )


def _pruned(problem: LinearProblem, start: Start, storage_dtype: torch.dtype) -> CompressedLinear:
    """Prune without rounding, and return the survivors as values."""
    columns = problem.columns
    swept = sweep_columns(columns, start, None, problem.recipe.block_size)
    drop = columns.put_back(swept.drop) if problem.recipe.prunes else None
    return replace(_nothing_yet(problem, drop), values=columns.put_back(swept.weight).to(storage_dtype))


def _nothing_yet(problem: LinearProblem, drop: Tensor | None) -> CompressedLinear:
    """Return the result as far as it does not depend on whether survivors are codes or values."""
    own, ordered = problem.objective.input.factor, problem.columns.factor
    return CompressedLinear(
        codes=None,
        values=None,
        keep=None if drop is None else ~drop,
        widths=None,
        grid=None,
        n_m=problem.recipe.n_m,
        relative_error=None,
        importance_range=(float(problem.importance.min()), float(problem.importance.max())),
        damp_percent=ordered.damp_percent,
        status=own.status if ordered.status == "ok" else ordered.status,
    )


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
    problem = LinearProblem(objective, columns, recipe, importance, row_weights.float(), name)
    start = choose_mask(problem, shared.natural if recipe.n_m else columns)
    rounded = round_to(problem, start, same_width(start, bits), "input")
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
