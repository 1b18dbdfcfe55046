"""The second stage of a solve: which weights go, and the survivors fitted to that."""

from sgpt_lightning.core.linear import LinearProblem, Start, sweep_columns
from sgpt_lightning.core.masks import MaskRule, refine_mask
from sgpt_lightning.core.problem import Columns
from sgpt_lightning.core.refit import fit_survivors


def choose_mask(problem: LinearProblem, columns: Columns) -> Start:
    """Choose the mask and fit the survivors to it, as far as that comes before the rounding sweep."""
    objective, recipe = problem.objective, problem.recipe
    if not recipe.prunes:
        return Start(objective.target, None)
    parts, rule = recipe.solve_parts, MaskRule(recipe.zeros, recipe.n_m)
    mixed = recipe.quantizes and recipe.allocation != "uniform"
    if not (mixed or parts.mask_steps or parts.refit_steps or (parts.act_order and recipe.n_m)):
        return Start(objective.target, rule)
    if parts.mask_steps:
        # A row's error counts by its weight, and errors are squares of weights. ADMM ends as well from what each weight
        # costs alone as from a sweep's mask (30.28 and 30.28 at 50 % on opt-mini), which takes a column loop.
        weighted = objective.target * problem.row_weights.sqrt()[:, None]
        drop = rule.removed(weighted.square() / objective.input.factor.inverse_diagonal)
        drop = refine_mask(weighted, objective.input.spectrum, drop, rule, parts.mask_steps)
    else:
        swept = sweep_columns(columns, Start(objective.target, rule), None, recipe.block_size)
        drop = columns.put_back(swept.drop)
    if not parts.refit_steps:
        return Start(objective.target, drop)
    return Start(fit_survivors(objective.target, objective.input.damped, drop, parts.refit_steps), drop)
