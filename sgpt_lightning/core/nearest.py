"""Plain rounding of one weight matrix: what is left to do where a solve fails and the recipe allows it.

The smallest weights go, the others are rounded to the nearest level; no input is asked, so no Hessian either. Shape of
the result and budget are those that the solve would have had: as many zeros, the widest width that the bits allow for
all channels alike, or whole codes on one step that take no more bits. The status `rounded` says so wherever the linear
is listed; its error is unknown.
"""

import torch
from torch import Tensor

from sgpt_lightning.core.budget import grid_kind, widest_width
from sgpt_lightning.core.grids import Grid, fit_affine_grid, quantize_matrix
from sgpt_lightning.core.masks import MaskRule
from sgpt_lightning.core.ranges import search_grid
from sgpt_lightning.core.rate import CodedSize
from sgpt_lightning.core.solution import Coded, CompressedLinear, Pruned, Quantized, Solution, SolveError
from sgpt_lightning.core.tables import round_table
from sgpt_lightning.recipe import Recipe


@torch.no_grad()
def round_plainly(
    weight: Tensor,
    recipe: Recipe,
    storage_dtype: torch.dtype = torch.float16,
    *,
    bits: float | None = None,
    coded_size: CodedSize | None = None,
    name: str = "",
) -> CompressedLinear:
    """Round a matrix to what the recipe asks for, without its inputs.

    Args:
        weight: `[out_features, in_features]`, any floating dtype, finite.
        recipe: settings, already resolved for the linear.
        storage_dtype: dtype of the survivors where they are not quantized.
        bits: true bits of the whole matrix, for entropy-coded codes; what the recipe gives a weight if None.
        coded_size: bytes that codes take when they are entropy-coded, see `compress_linears`.
        name: the linear, for error messages.

    Raises:
        SolveError: it cannot be stored this way either: not within the bits, or not in `storage_dtype`.
        ValueError: the budget is below what mask, ranges and the narrowest width take.
    """
    matrix = weight.detach().float()
    solution: Solution
    if recipe.coding == "entropy":
        solution = _coded(matrix, recipe, bits, coded_size, name)
    else:
        drop = MaskRule(recipe.zeros, recipe.n_m).removed(matrix.abs()) if recipe.prunes else None
        survivors = matrix if drop is None else matrix.masked_fill(drop, 0)
        keep = None if drop is None else ~drop
        if recipe.quantizes:
            solution = _quantized(survivors, keep, recipe, name)
        else:
            solution = Pruned(survivors.to(storage_dtype), keep, recipe.n_m)
    if not bool(torch.isfinite(solution.weight()).all()):
        raise SolveError(f"{name or 'the linear'} holds weights, up to {float(matrix.abs().max()):.3g}, that overflow")
    allocation = "uniform" if isinstance(solution, Quantized) else None
    return CompressedLinear(solution, None, (1.0, 1.0), damp_percent=0.0, status="rounded", allocation=allocation)


def _coded(matrix: Tensor, recipe: Recipe, bits: float | None, coded_size: CodedSize | None, name: str) -> Coded:
    assert coded_size is not None
    if bits is None:
        assert recipe.target_bits_per_weight is not None
        bits = recipe.target_bits_per_weight * matrix.numel()
    return round_table(matrix, bits, coded_size, name=name or "the linear")


def _quantized(survivors: Tensor, keep: Tensor | None, recipe: Recipe, name: str) -> Quantized:
    rows, columns = survivors.shape
    width, kind = widest_width(recipe, (rows, columns), name), grid_kind(recipe)
    widths = torch.full((columns,), width, dtype=torch.uint8, device=survivors.device)
    grid: Grid
    if kind == "zero-point":
        grid = fit_affine_grid(survivors, width, recipe.group_size)
    else:
        alike = torch.ones(columns, dtype=torch.float32, device=survivors.device)
        search = recipe.solve_parts.range_search
        grid = search_grid(kind, survivors, alike, widths, group_size=recipe.group_size, search=search)
    return Quantized(quantize_matrix(survivors, widths, grid), widths, grid, keep, recipe.n_m)
