"""Linears that share an input: mask, widths and codes in one solve.

The order of things, where a part that the recipe switches off is left out (`Parts`):

1. the objective: Hessian around the mean, target between the weight and the best answer (`objective.py`);
2. the mask: chosen by ADMM (`masks.py`) or by a sweep, survivors refitted to it (`refit.py`);
3. a width for each channel, paid for by its survivors (`allocation.py`);
4. a grid for each row (`grids.py`, `ranges.py`);
5. the sweep that rounds, columns in act order (`sweep.py`);
6. descent over the codes and ranges refitted, in turn.

Where channels are scaled (`scaling.py`), 3 to 6 are done in the units of the scaled weights, once for each exponent.

Where codes are entropy-coded, `rate.py` takes the place of 2 to 6: steps, row scales, and the level for a size.

What cannot be solved is an error, or, where the recipe's `on_failure` says `round`, rounded plainly (`nearest.py`).

With all parts off this is the published SparseGPT: the mask is chosen inside the sweep that rounds, block by block, and
a row's range is that of the whole row. Where the mask must be known before (mixed widths, act order with N:M
groups, or a refit) a sweep that only prunes chooses it.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.core.checks import check_linear, check_objective, check_own_settings
from sgpt_lightning.core.grids import quantize_matrix
from sgpt_lightning.core.hessian import HessianError
from sgpt_lightning.core.importance import channel_importance
from sgpt_lightning.core.linear import LinearProblem, Start, relative_weights, sweep_columns
from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.core.nearest import round_plainly
from sgpt_lightning.core.objective import make_objective
from sgpt_lightning.core.problem import SharedInput
from sgpt_lightning.core.pruning import choose_masks
from sgpt_lightning.core.rate import CodedSize, rate_problem, solve_rates
from sgpt_lightning.core.rounding import allocation_used, round_survivors, round_to, same_width
from sgpt_lightning.core.scaling import round_scaled
from sgpt_lightning.core.solution import CompressedLinear, Pruned, Quantized, Solution, SolveError
from sgpt_lightning.guards import exact_float32
from sgpt_lightning.recipe import Recipe


class LinearToSolve(NamedTuple):
    """One weight matrix, and what is known of the linear that it belongs to."""

    weight: Tensor
    """`[out_features, in_features]`, any floating dtype, on the device where the solve is to run."""
    name: str = ""
    """The linear, for error messages."""
    row_weights: Tensor | None = None
    """What a unit of squared output error costs the model's loss, `[out_features]`; equal if None."""
    bits: float | None = None
    """True bits that an entropy-coded matrix may take; what the recipe gives a weight, times the weights, if None."""
    widths: Tensor | None = None
    """Bits per input channel, uint8 `[in_features]`, where the caller and not the recipe's `quantile` deals them."""
    symmetric: bool = False
    """Whether grids reach as far below zero as above; for min-max grids of whole rows."""


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
    """Prune and quantize one weight matrix to fixed widths; arguments and errors as `compress_linears`."""
    linear = LinearToSolve(weight, name, row_weights)
    return compress_linears([linear], inputs, recipe, storage_dtype, has_bias=has_bias)[0]


@torch.no_grad()
@exact_float32()
def compress_linears(
    linears: Sequence[LinearToSolve],
    inputs: InputStatistics | SharedInput,
    recipe: Recipe,
    storage_dtype: torch.dtype = torch.float16,
    *,
    has_bias: bool = False,
    coded_size: CodedSize | None = None,
) -> list[CompressedLinear]:
    """Prune and quantize weight matrices against the input that all of them were seen to receive.

    Each is solved as it would be alone; the column loops run once, over all of them side by side.

    Args:
        linears: the matrices, one at least.
        inputs: moments of the input, on the device of the weights; shared where other linears receive it too.
        recipe: settings, already resolved for these linears.
        storage_dtype: dtype of the survivors when they are not quantized.
        has_bias: whether the linears have biases that may take over the mean of the error.
        coded_size: bytes that int32 codes take when they are entropy-coded (`format.entropy.coded_size`); needed where
            the recipe's coding is `entropy`.

    Returns:
        One result per linear, in order.

    Raises:
        ValueError: the linears saw no token, in_features is not divisible by M of an N:M pattern, the budget is below
            what mask, ranges and the narrowest width take, weights and moments are on different devices,
            `coded_size` is missing, or a linear's own settings do not go with the recipe.
        HessianError: the Hessian cannot be inverted, and the recipe's `on_failure` is `error`.
        SolveError: a weight holds NaN or inf; or, if `on_failure` is `error`, what would be stored does.
    """
    for linear in linears:
        check_linear(linear.weight, linear.name, inputs, recipe)
        check_own_settings(linear.widths, linear.symmetric, recipe, linear.name)
    if recipe.coding == "entropy" and coded_size is None:
        raise ValueError("coding entropy needs coded_size, such as sgpt_lightning.format.entropy.coded_size")
    return _solved_or_rounded(linears, SharedInput.of(inputs), recipe, storage_dtype, has_bias, coded_size)


def _solved_or_rounded(
    linears: Sequence[LinearToSolve],
    inputs: SharedInput,
    recipe: Recipe,
    storage_dtype: torch.dtype,
    has_bias: bool,
    coded_size: CodedSize | None,
) -> list[CompressedLinear]:
    """Solve linears together; where that fails and the recipe allows it, each alone, or else round it plainly."""
    try:
        return _solved(linears, inputs, recipe, storage_dtype, has_bias, coded_size)
    except (HessianError, SolveError) as error:
        if recipe.on_failure == "error":
            raise
        failure = str(error)
    if len(linears) > 1:
        alone = (_solved_or_rounded([one], inputs, recipe, storage_dtype, has_bias, coded_size) for one in linears)
        return [solution for solutions in alone for solution in solutions]
    (one,) = linears
    rounded = round_plainly(one.weight, recipe, storage_dtype, bits=one.bits, coded_size=coded_size, name=one.name)
    return [replace(rounded, failure=failure)]


def _solved(
    linears: Sequence[LinearToSolve],
    inputs: SharedInput,
    recipe: Recipe,
    storage_dtype: torch.dtype,
    has_bias: bool,
    coded_size: CodedSize | None,
) -> list[CompressedLinear]:
    """Solve linears together, or fail on one of them."""
    try:
        problems = [_make_problem(linear, inputs, recipe, has_bias=has_bias) for linear in linears]
        if recipe.coding == "entropy":
            assert coded_size is not None
            return list(map(_judged, linears, problems, _coded(linears, problems, coded_size)))
        shared, columns = problems[0].objective.input, problems[0].columns
        starts = choose_masks(problems, shared.natural if recipe.n_m else columns)
        if recipe.quantizes and recipe.scaling.mode != "none":
            scaled = round_scaled(problems, starts, _quantized)
            judged = map(_judged, linears, problems, [chosen.solution for chosen in scaled])
            return [replace(one, scaling_alpha=chosen.alpha) for one, chosen in zip(judged, scaled, strict=True)]
        solutions = _quantized(problems, starts) if recipe.quantizes else _pruned(problems, starts, storage_dtype)
        return list(map(_judged, linears, problems, solutions))
    except torch.linalg.LinAlgError as error:  # which says nothing of the linear
        names = ", ".join(linear.name or "the linear" for linear in linears)
        raise SolveError(f"{names} cannot be solved: {error}") from error


def _coded(
    linears: Sequence[LinearToSolve], problems: Sequence[LinearProblem], coded_size: CodedSize
) -> list[Solution]:
    """Find the steps at which each linear's codes take the bits it may."""
    rate = problems[0].recipe.target_bits_per_weight
    assert rate is not None
    budgets = [rate * linear.weight.numel() if linear.bits is None else linear.bits for linear in linears]
    return list(solve_rates(list(map(rate_problem, problems)), budgets, coded_size))


def _make_problem(
    linear: LinearToSolve, inputs: InputStatistics | SharedInput, recipe: Recipe, *, has_bias: bool
) -> LinearProblem:
    weight, name, row_weights = linear.weight, linear.name, linear.row_weights
    parts = recipe.solve_parts
    objective = make_objective(weight.float(), inputs, parts, has_bias=has_bias, damp_percent=recipe.damping, name=name)
    shared = objective.input
    check_objective(objective, name)
    importance = channel_importance(
        objective.target, shared.statistics, shared.factor.inverse_diagonal, recipe.importance
    )
    columns = shared.act_ordered if parts.act_order and recipe.coding == "fixed" else shared.natural
    costs = relative_weights(row_weights, weight)
    return LinearProblem(objective, columns, recipe, importance, costs, name, linear.widths, linear.symmetric)


def _quantized(problems: Sequence[LinearProblem], starts: Sequence[Start]) -> list[Quantized]:
    """Round what the masks leave, or choose the masks on the way."""
    n_m = problems[0].recipe.n_m
    return [
        Quantized(quantize_matrix(stored, widths, grid), widths, grid, None if drop is None else ~drop, n_m)
        for stored, widths, grid, drop in round_survivors(problems, starts)
    ]


def _pruned(problems: Sequence[LinearProblem], starts: Sequence[Start], storage_dtype: torch.dtype) -> list[Solution]:
    """Prune without rounding."""
    columns, recipe = problems[0].columns, problems[0].recipe
    swept = sweep_columns(columns, starts, None, recipe.block_size)
    return [
        Pruned(
            columns.put_back(result.weight).to(storage_dtype),
            ~columns.put_back(result.drop) if recipe.prunes else None,
            recipe.n_m,
        )
        for result in swept
    ]


def _judged(linear: LinearToSolve, problem: LinearProblem, solution: Solution) -> CompressedLinear:
    """Measure a solution, and refuse one that is no number."""
    objective, name, stored = problem.objective, problem.name or "the linear", solution.weight()
    error = objective.relative_error(stored)
    if not math.isfinite(error):
        largest = float(objective.weight.abs().max())
        if isinstance(solution, Pruned) and largest > torch.finfo(solution.values.dtype).max:
            raise SolveError(
                f"{name} would be stored with NaN or inf: its weights, up to {largest:.3g}, overflow "
                f"{solution.values.dtype}; store in bfloat16 or float32"
            )
        raise SolveError(f"the relative error of {name} is {error}: it cannot be told how good the result is")
    own, ordered = objective.input.factor, problem.columns.factor
    return CompressedLinear(
        solution,
        error,
        importance_range=(float(problem.importance.min()), float(problem.importance.max())),
        damp_percent=ordered.damp_percent,
        status=own.status if ordered.status == "ok" else ordered.status,
        bias_shift=objective.bias_shift(stored),
        allocation=allocation_used(problem.recipe, solution.widths) if isinstance(solution, Quantized) else None,
        predicted_loss=_predicted_loss(linear.row_weights, objective.row_errors(stored)),
    )


def _predicted_loss(row_weights: Tensor | None, row_errors: Tensor) -> float | None:
    """Return sum_r E[g_r^2] E[e_r^2] / 2, the loss to second order (`calibration/gradients.py`)."""
    return None if row_weights is None else max(float(row_weights.to(row_errors) @ row_errors) / 2, 0.0)


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
def try_width(linear: LinearToSolve, inputs: InputStatistics | SharedInput, recipe: Recipe, bits: int) -> Trial:
    """Solve on the dense model's inputs, as far as is needed to know the errors that a mask and one width make."""
    problem = pose_dense(linear, inputs, recipe)
    shared = problem.objective.input
    (start,) = choose_masks([problem], shared.natural if recipe.n_m else problem.columns)
    (rounded,) = round_to([problem], [start], [same_width(start, bits)], "input")
    keep = torch.ones_like(rounded.stored) if rounded.drop is None else ~rounded.drop
    pruning = problem.row_costs(start.survivors)
    return Trial(pruning, problem.row_costs(rounded.stored) - pruning, keep.sum(1, dtype=torch.float64))


@torch.no_grad()
@exact_float32()
def pose_dense(linear: LinearToSolve, inputs: InputStatistics | SharedInput, recipe: Recipe) -> LinearProblem:
    """Return the problem of a linear on the dense model's inputs: the target is the weight itself.

    Row weights are taken as they are, in units of the model's loss.
    """
    check_linear(linear.weight, linear.name, inputs, recipe)
    parts = replace(recipe.solve_parts, alpha=0.0, descent_passes=0)
    objective = make_objective(
        linear.weight.float(), inputs, parts, has_bias=True, damp_percent=recipe.damping, name=linear.name
    )
    columns = objective.input.act_ordered if parts.act_order else objective.input.natural
    ones = torch.ones(linear.weight.shape[1], dtype=torch.float32, device=linear.weight.device)
    assert linear.row_weights is not None
    return LinearProblem(objective, columns, recipe, ones, linear.row_weights.float(), linear.name)
