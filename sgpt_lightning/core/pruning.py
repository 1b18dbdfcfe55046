"""The second stage of a solve: which weights go, and the survivors fitted to that."""

from collections.abc import Sequence

from torch import Tensor

from sgpt_lightning.core.linear import LinearProblem, Start, sweep_columns
from sgpt_lightning.core.masks import MaskRule, refine_masks
from sgpt_lightning.core.problem import Columns
from sgpt_lightning.core.refit import fit_survivors


def choose_masks(problems: Sequence[LinearProblem], columns: Columns) -> list[Start]:
    """Choose the masks and fit the survivors to them, as far as that comes before the rounding sweep.

    Args:
        problems: linears that share an input and a recipe.
        columns: in which order a sweep that only prunes takes the columns.
    """
    recipe = problems[0].recipe
    if not recipe.prunes:
        return [Start(problem.objective.target, None) for problem in problems]
    parts, rule = recipe.solve_parts, MaskRule(recipe.zeros, recipe.n_m)
    mixed = recipe.quantizes and recipe.allocation != "uniform"
    by_rule = [Start(problem.objective.target, rule) for problem in problems]
    if not (mixed or parts.mask_steps or parts.refit_steps or (parts.act_order and recipe.n_m)):
        return by_rule
    if parts.mask_steps:
        drops = _search_masks(problems, rule)
    else:
        swept = sweep_columns(columns, by_rule, None, recipe.block_size)
        drops = [columns.put_back(result.drop) for result in swept]
    return [_fit(problem, drop) for problem, drop in zip(problems, drops, strict=True)]


def _search_masks(problems: Sequence[LinearProblem], rule: MaskRule) -> list[Tensor]:
    """Return masks by ADMM, bool `[out_features, in_features]`, True where removed."""
    shared = problems[0].objective.input
    # A row's error counts by its weight, and errors are squares of weights. ADMM ends as well from what each weight
    # costs alone as from a sweep's mask (30.28 and 30.28 at 50 % on opt-mini), which takes a column loop.
    weighted = [problem.objective.target * problem.row_weights.sqrt()[:, None] for problem in problems]
    drops = [rule.removed(target.square() / shared.factor.inverse_diagonal) for target in weighted]
    return refine_masks(weighted, shared.damped, drops, rule, problems[0].recipe.solve_parts.mask_steps)


def _fit(problem: LinearProblem, drop: Tensor) -> Start:
    """Fit the survivors to a mask, where the recipe asks for it."""
    target, steps = problem.objective.target, problem.recipe.solve_parts.refit_steps
    return Start(fit_survivors(target, problem.objective.input.damped, drop, steps) if steps else target, drop)
