"""A scale for each input channel: W x = (W D)(D^-1 x), and V = W D is what is rounded.

A row of a grid has one step for all its columns, so columns that matter more than their weights are large get a finer
step where they are made larger first. As in SmoothQuant (arXiv 2211.10438, section 4), d_j = (a_j / w_j)^alpha; a_j is
the channel's mean absolute input E|x_j| and w_j its largest weight max_i |W_ij|; alpha = 0 changes nothing. As in AWQ
(arXiv 2306.00978, section 3.2), alpha is searched for; here by whole solves, and by the error that they end with.

The Hessian is damped first and scaled then: V is solved against D^-1 (H + lambda I) D^-1, whose factor is U D where U
is that of H + lambda I, so nothing is factored again. The problem stays the same, only its units change; what pruning
costs does not, and neither do masks that were chosen before. What rounding costs does.

Scales are rounded to the dtype of the file before anything is solved with them. The file holds 1 / d, by which columns
of V are multiplied in the end. Columns are solved in the order of diag H, as without scales.

Left out: entropy-coded matrices. Their steps are one to a column already, so a scale of columns is what they have.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.core.hessian import InverseFactor
from sgpt_lightning.core.importance import channel_importance
from sgpt_lightning.core.linear import LinearProblem, Start
from sgpt_lightning.core.problem import InputProblem
from sgpt_lightning.core.solution import Quantized
from sgpt_lightning.presets import Scaling

ALPHAS = tuple(step / 10 for step in range(1, 11))
"""What a search tries beside 0, ascending."""
LARGEST = 16.0
"""No scale is larger than this, or smaller than its reciprocal."""

Rounding = Callable[[Sequence[LinearProblem], Sequence[Start]], Sequence[Quantized]]


class ScaledSolution(NamedTuple):
    """Codes, and the alpha of the scales that they were solved with."""

    solution: Quantized
    alpha: float


def channel_scale(weights: Sequence[Tensor], mean_abs: Tensor, alpha: float, *, whole: bool = False) -> Tensor:
    """Return 1 / d, what the columns of V are multiplied by, float16 `[in_features]`.

    Args:
        weights: of the linears that are to have these scales, `[out_features, in_features]` each.
        mean_abs: E|x_j|, `[in_features]`; channels of no input or no weight get 1.
        alpha: from 0 (all 1) to 1.
        whole: round to powers of two.
    """
    activation, largest = mean_abs.double(), torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).double()
    live = (activation > 0) & (largest > 0)
    ratio = torch.where(live, activation, 1).log2() - torch.where(live, largest, 1).log2()
    centred = torch.where(live, ratio - ratio.sum() / live.sum().clamp_min(1), 0)  # the geometric mean of d is 1
    exponent = -alpha * centred
    return (exponent.round() if whole else exponent).exp2().clamp(1 / LARGEST, LARGEST).to(torch.float16)


class ScaledInput(InputProblem):
    """The input D^-1 x, of a problem that has been posed for x.

    Args:
        original: the problem for x; it stays as it is.
        d: the diagonal of D, float32 `[in_features]`.
    """

    def __init__(self, original: InputProblem, d: Tensor) -> None:
        self.__dict__ |= {name: getattr(original, name) for name in ("statistics", "damp_percent", "name")}
        self._original, self._d = original, d
        self.mean, self.dense_mean = (None if m is None else m / d for m in (original.mean, original.dense_mean))

    @cached_property
    def hessian(self) -> Tensor:
        """D^-1 H D^-1, float32 `[in_features, in_features]`."""
        return self._original.hessian / self._d / self._d[:, None]

    @cached_property
    def damped(self) -> Tensor:
        """D^-1 (H + lambda I) D^-1, float32 `[in_features, in_features]`."""
        return self._original.damped / self._d / self._d[:, None]

    @cached_property
    def factor(self) -> InverseFactor:
        """Of `damped`, in the matrix's own order."""
        return scaled_factor(self._original.factor, self._d)


def scaled_factor(factor: InverseFactor, d: Tensor) -> InverseFactor:
    """Return the factor U D of (D^-1 (H + lambda I) D^-1)^-1; `d` in the order of the factor's columns."""
    return factor._replace(hinv_chol=factor.hinv_chol * d)


class _ScaledChannels(NamedTuple):
    """What the scores of channels ask of D^-1 x."""

    mean_abs: Tensor
    variance: Tensor


def scaled_problem(problem: LinearProblem, scale: Tensor) -> LinearProblem:
    """Pose a problem in the units of V = W D, D^-1 being what `channel_scale` returned."""
    d, objective, columns = scale.float().reciprocal(), problem.objective, problem.columns
    original, target = objective.input, objective.target * d
    channels = _ScaledChannels(original.statistics.mean_abs / d, original.statistics.variance / d.square())
    inverse_diagonal = original.factor.inverse_diagonal * d.square()
    factor = scaled_factor(columns.factor, d if columns.order is None else d[columns.order])
    return problem._replace(
        objective=replace(objective, input=ScaledInput(original, d), weight=objective.weight * d, target=target),
        columns=columns._replace(factor=factor),
        importance=channel_importance(target, channels, inverse_diagonal, problem.recipe.importance),
    )


def round_scaled(
    problems: Sequence[LinearProblem], starts: Sequence[Start], rounding: Rounding
) -> list[ScaledSolution]:
    """Round matrices with scales as the recipe says; where it searches, with the alpha of least error.

    The error is that of the outputs from the target, weighted by rows where these have weights: what the solve
    minimises, without damping. Without either it is the relative error that is reported. Linears that are to share
    their scales, so that these can be folded, share alpha: that of the least sum of their relative errors.

    Args:
        problems: linears that share an input and a recipe.
        starts: where each of them starts from, in the units of its own weights.
        rounding: solves problems for codes, in the units that they are posed in.
    """
    scaling = problems[0].recipe.scaling
    linears = list(zip(problems, starts, strict=True))
    groups = [linears] if scaling.fold else [[linear] for linear in linears]
    if scaling.mode == "fixed" and scaling.alpha:
        return [solved for group in groups for solved in _solved(group, scaling.alpha, rounding)]
    plain = [problem._replace(recipe=replace(problem.recipe, scaling=Scaling())) for problem in problems]
    unscaled = iter([ScaledSolution(solution, 0.0) for solution in rounding(plain, starts)])
    if scaling.mode == "fixed":
        return list(unscaled)
    return [solved for group in groups for solved in _searched(group, [next(unscaled) for _ in group], rounding)]


_Group = Sequence[tuple[LinearProblem, Start]]
"""Linears that have the same scales."""


def _searched(group: _Group, best: list[ScaledSolution], rounding: Rounding) -> list[ScaledSolution]:
    """Try all alphas, beginning with the solutions for 0; ties go to the smaller one."""
    least = _error(group, best)
    for alpha in ALPHAS:
        tried = _solved(group, alpha, rounding)
        error = _error(group, tried)
        if error < least:
            best, least = tried, error
    return best


def _solved(group: _Group, alpha: float, rounding: Rounding) -> list[ScaledSolution]:
    """Solve problems with the scales of one alpha."""
    problem, _ = group[0]
    weights = [problem.objective.weight for problem, _ in group]
    mean_abs = problem.objective.input.statistics.mean_abs
    scale = channel_scale(weights, mean_abs, alpha, whole=problem.recipe.scaling.fold)
    d = scale.float().reciprocal()
    starts = [start._replace(weight=start.weight * d) for _, start in group]
    rounded = rounding([scaled_problem(problem, scale) for problem, _ in group], starts)
    # Copies: a file does not hold one tensor under two names.
    return [ScaledSolution(replace(solution, channel_scale=scale.clone()), alpha) for solution in rounded]


def _error(group: _Group, solved: Sequence[ScaledSolution]) -> float:
    return sum(_relative_error(problem, one.solution) for (problem, _), one in zip(group, solved, strict=True))


def _relative_error(problem: LinearProblem, solution: Quantized) -> float:
    around = replace(problem.objective, weight=problem.objective.target)
    error = float((around.row_errors(solution.weight()) * problem.row_weights).sum())
    whole = float((around.row_errors(torch.zeros_like(around.weight)) * problem.row_weights).sum())
    return error / whole if whole > 0 else error
