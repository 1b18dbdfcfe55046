"""What a recipe's budget buys in one matrix: from true bits per weight to mean code bits per survivor, and back.

Everything that is not a code is fixed once the shape, the recipe and the widths in use are known: mask, ranges, origins
and the width of each channel, priced by `sizes.py`. What is left of the budget goes to the codes of the survivors.
"""

import math
from collections.abc import Sequence

from sgpt_lightning.core.grids import GridKind, WidthAxis
from sgpt_lightning.core.masks import MaskRule
from sgpt_lightning.core.sizes import SCALE_BITS, grid_bits, mask_bits
from sgpt_lightning.recipe import Recipe

_ROUNDING = 1e-9


def grid_kind(recipe: Recipe) -> GridKind:
    """Return the kind of grid that a recipe's codes lie on."""
    if recipe.prunes and recipe.solve_parts.zero_free:
        return "zero-free"
    return "offset" if recipe.solve_parts.range_search else "zero-point"


def width_axis(recipe: Recipe) -> WidthAxis:
    """Return which channels a recipe deals widths to."""
    return "output" if recipe.allocation == "rows" else "input"


def count_survivors(recipe: Recipe, shape: tuple[int, int]) -> int:
    """Return how many weights of a matrix are left."""
    weights = math.prod(shape)
    return weights - MaskRule(recipe.zeros, recipe.n_m).count(weights) if recipe.prunes else weights


def fixed_bits(recipe: Recipe, shape: tuple[int, int], axis: WidthAxis, widths: Sequence[int]) -> int:
    """Return the bits of all that is no code, at most.

    Args:
        recipe: settings, already resolved for the linear.
        shape: (out_features, in_features).
        axis: what has a width of its own.
        widths: those in use; the codes of each may end within a byte.
    """
    mask = min(mask_bits(shape, recipe.n_m).values()) if recipe.prunes else 0
    scales = 0 if recipe.scaling.mode == "none" else SCALE_BITS * shape[1]
    return mask + scales + grid_bits(grid_kind(recipe), axis, widths, shape, recipe.group_size) + 7 * len(widths)


def mean_code_bits(
    recipe: Recipe, shape: tuple[int, int], axis: WidthAxis, widths: Sequence[int], name: str = ""
) -> float:
    """Return the code bits per survivor that the recipe's budget leaves when `widths` are in use.

    Raises:
        ValueError: the budget is below what mask, ranges and the narrowest width take.
    """
    if recipe.target_bits_per_weight is None:
        assert recipe.target_avg_bits is not None
        return recipe.target_avg_bits
    weights, survivors = math.prod(shape), count_survivors(recipe, shape)
    mean = (recipe.target_bits_per_weight * weights - fixed_bits(recipe, shape, axis, widths)) / survivors
    if mean < recipe.widths[0]:
        least = recipe.target_bits_per_weight + (recipe.widths[0] - mean) * survivors / weights
        raise ValueError(
            f"target_bits_per_weight must be at least {least:.3f} for {name or 'the linear'} "
            f"({shape[0]} x {shape[1]}), which mask, ranges and codes of {recipe.widths[0]} bits take, "
            f"got {recipe.target_bits_per_weight:g}"
        )
    return min(mean, recipe.widths[-1])


def widest_width(recipe: Recipe, shape: tuple[int, int], name: str = "") -> int:
    """Return the widest width that the budget allows to every channel alike; raises ValueError as above."""
    return max(b for b in recipe.widths if b <= mean_code_bits(recipe, shape, "input", (b,), name) + _ROUNDING)


def least_bits(recipe: Recipe | None, shape: tuple[int, int], storage_bits: int) -> float:
    """Return how many bits a matrix will take at least; None for the recipe leaves it as it is.

    Args:
        recipe: settings, already resolved for the linear.
        shape: (out_features, in_features).
        storage_bits: bits of a weight that is not quantized.
    """
    if recipe is None:
        return storage_bits * math.prod(shape)
    survivors = count_survivors(recipe, shape)
    if recipe.coding == "entropy":
        assert recipe.target_bits_per_weight is not None
        return _LEAST_USED * recipe.target_bits_per_weight * survivors
    if not recipe.quantizes:
        return storage_bits * survivors
    if recipe.target_bits_per_weight is not None and recipe.scope == "model":
        return recipe.widths[0] * survivors
    return _LEAST_USED * mean_code_bits(recipe, shape, width_axis(recipe), recipe.widths) * survivors


_LEAST_USED = 0.9
"""Part of a budget that is spent at least, whatever the allocation."""
