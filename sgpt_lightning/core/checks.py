"""What is refused before a linear is solved: weights, inputs and settings that no solve can make anything of."""

import torch
from torch import Tensor

from sgpt_lightning.core.budget import grid_kind
from sgpt_lightning.core.hessian import HessianError
from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.core.objective import Objective
from sgpt_lightning.core.problem import SharedInput
from sgpt_lightning.core.solution import SolveError
from sgpt_lightning.recipe import Recipe


def check_linear(weight: Tensor, name: str, inputs: InputStatistics | SharedInput, recipe: Recipe) -> None:
    """Check what no way to store the linear could do without.

    Args:
        weight: `[out_features, in_features]`.
        name: the linear, for messages.
        inputs: moments of its input.
        recipe: settings, already resolved for the linear.

    Raises:
        ValueError: the pattern does not divide the inputs, or weight and moments are on different devices.
        SolveError: the weight holds NaN or inf.
    """
    check_pattern(recipe, weight.shape[1], name)
    seen_on = SharedInput.of(inputs).statistics.second_moment.device
    if weight.device != seen_on:
        raise ValueError(
            f"the weight of {name or 'the linear'} is on {weight.device}, what it received on {seen_on}: move one of "
            "them"
        )
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


def check_own_settings(widths: Tensor | None, symmetric: bool, recipe: Recipe, name: str) -> None:
    """Raise ValueError if widths that are dealt already, or a symmetric grid, have no place in a recipe's solve."""
    if recipe.on_failure != "error" and (widths is not None or symmetric):
        raise ValueError(f"{name or 'the linear'} has settings of its own, so on_failure must be 'error'")
    if widths is not None and recipe.allocation != "quantile":
        raise ValueError(
            f"{name or 'the linear'} has widths that are dealt already, so allocation must be 'quantile', "
            f"got {recipe.allocation!r}"
        )
    if symmetric and (recipe.coding != "fixed" or grid_kind(recipe) != "zero-point" or recipe.group_size is not None):
        raise ValueError(
            f"{name or 'the linear'} is to have a symmetric grid, which min-max grids of whole rows can be (presets "
            "sparsegpt and gptq without group_size)"
        )


def check_objective(objective: Objective, name: str) -> None:
    """Refuse what would be solved to nothing, or to no number.

    Raises:
        HessianError: all inputs are zero on all tokens, or so small that their squares are in float32.
        SolveError: what the linear should come close to holds NaN or inf.
    """
    facts = objective.input.statistics.second_moment.diagonal().any(), torch.isfinite(objective.target).all()
    fires, finite = torch.stack(facts).tolist()  # one read, should they be on a GPU
    if not fires:
        raise HessianError(
            f"every input of {name or 'the linear'} is zero on all calibration tokens: all its weights would become "
            "zero; calibrate on more text, or put it into `ignore`"
        )
    if not finite:
        raise SolveError(f"what {name or 'the linear'} should come close to holds NaN or inf")
