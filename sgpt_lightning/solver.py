"""One linear: mask, widths and codes in one solve.

The column sweep is that of SparseGPT (arXiv 2301.00774, algorithm 1) and GPTQ (arXiv 2210.17323, algorithm 1): each
column is rounded to what will be stored, and its error is fed forward to the columns that are still free through the
Cholesky factor of the inverse Hessian. Pruning only, quantizing only and both are the same loop; what differs is
whether a column loses weights and whether the rest of it is rounded to a grid.

The mask is chosen inside the sweep, block by block, as SparseGPT does. Where it must be known before (mixed widths
are paid for by the survivors of each channel, and act order takes N:M groups apart) a first sweep, pruning only,
chooses it, and the second one keeps it. A row's range is that of its survivors where the mask is known before the
sweep that quantizes, and that of the whole row otherwise, as in the published code; min-max ranges rarely differ.

The matrix is held transposed, `[in_features, out_features]`, so that a column is contiguous. No step of the loop
reads a tensor's value back to Python.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.allocation import allocate_budget, allocate_quantile
from sgpt_lightning.grids import AffineGrid, dequantize, dequantize_columns, fit_affine_grid, quantize
from sgpt_lightning.hessian import InverseFactor, inverse_factor
from sgpt_lightning.importance import channel_importance
from sgpt_lightning.masks import lowest, lowest_n_of_m
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.statistics import InputStatistics


class MaskRule(NamedTuple):
    """How the sweep chooses what to remove: a fraction of each block, or N of every M inputs."""

    sparsity: float
    n_m: tuple[int, int] | None = None


@dataclass(frozen=True)
class CompressedLinear:
    """What is left of one weight matrix, exactly as it will be stored, and how well it does."""

    codes: Tensor | None
    """uint8 `[out_features, in_features]`; removed weights hold the zero point. None if not quantized."""
    values: Tensor | None
    """The weights in the storage dtype, `[out_features, in_features]`, if not quantized."""
    keep: Tensor | None
    """True where a weight survives, bool `[out_features, in_features]`. None if nothing was removed."""
    widths: Tensor | None
    """Bits per input channel, uint8 `[in_features]`. None if not quantized."""
    grid: AffineGrid | None
    """Ranges and zero points of the rows. None if not quantized."""
    n_m: tuple[int, int] | None
    """(N, M) if every M consecutive inputs hold N zeros."""
    relative_error: float
    """tr((W - Q) H (W - Q)') / tr(W H W'): squared output error as a fraction of the squared output."""
    importance_range: tuple[float, float]
    """Lowest and highest channel importance."""
    damp_percent: float
    """Damping used, a fraction of the mean Hessian diagonal."""
    status: str
    """`ok`, `damped` or `float64`, see `hessian.py`."""

    def weight(self) -> Tensor:
        """Return the matrix that the model computes with, float32 `[out_features, in_features]`."""
        if self.codes is None:
            assert self.values is not None
            return self.values.float()
        assert self.widths is not None
        assert self.grid is not None
        return dequantize_columns(self.codes, self.widths, self.grid)


class _Sweep(NamedTuple):
    """Result of one sweep, inputs first: `[in_features, out_features]`."""

    weight: Tensor
    drop: Tensor
    codes: Tensor | None


@torch.no_grad()
def compress_linear(
    weight: Tensor,
    statistics: InputStatistics,
    recipe: Recipe,
    name: str = "",
    storage_dtype: torch.dtype = torch.float16,
) -> CompressedLinear:
    """Prune and quantize one weight matrix against the inputs it was seen to receive.

    Args:
        weight: `[out_features, in_features]`, any floating dtype, on the device where the solve is to run.
        statistics: moments of the input, on the same device.
        recipe: settings, already resolved for this linear.
        name: the linear, for error messages.
        storage_dtype: dtype of the survivors when they are not quantized.

    Raises:
        ValueError: the linear saw no token, or in_features is not divisible by M of an N:M pattern.
        HessianError: the Hessian cannot be inverted.
    """
    if statistics.tokens == 0:
        raise ValueError(f"{name or 'the linear'} saw no token during calibration")
    check_pattern(recipe, weight.shape[1], name)
    hessian = statistics.second_moment
    factor = inverse_factor(hessian, recipe.damp_percent, name)
    status = factor.status
    free = torch.where(factor.dead, 0, weight.float())
    importance = channel_importance(free, statistics, factor.inverse_diagonal, recipe.importance)
    rule = MaskRule(recipe.sparsity, recipe.n_m)
    mixed = recipe.quantizes and recipe.allocation != "uniform"
    mask: MaskRule | Tensor | None = rule if recipe.prunes else None
    if mask is not None and (mixed or (recipe.act_order and rule.n_m)):
        mask = _sweep(free.T, factor.hinv_chol, rule, None, recipe.block_size).drop
    quantizer = None
    if recipe.quantizes:
        drop = mask if isinstance(mask, Tensor) else None
        widths = _choose_widths(recipe, importance, free.T, drop)
        survivors = free if drop is None else free.masked_fill(drop.T, 0)
        quantizer = (widths, fit_affine_grid(survivors, int(widths.max())))
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if recipe.act_order else None
    if order is not None:
        factor = inverse_factor(hessian[order][:, order], factor.damp_percent, name)
    solved = _ordered_sweep(free.T, factor, order, mask, quantizer, recipe.block_size)
    result = CompressedLinear(
        codes=None if solved.codes is None else solved.codes.T.contiguous(),
        values=solved.weight.T.to(storage_dtype).contiguous() if solved.codes is None else None,
        keep=~solved.drop.T.contiguous() if recipe.prunes else None,
        widths=None if quantizer is None else quantizer[0],
        grid=None if quantizer is None else quantizer[1],
        n_m=rule.n_m,
        relative_error=float("nan"),
        importance_range=(float(importance.min()), float(importance.max())),
        damp_percent=factor.damp_percent,
        status=status if factor.status == "ok" else factor.status,
    )
    return replace(result, relative_error=relative_error(weight.float(), result.weight(), hessian))


def check_pattern(recipe: Recipe, in_features: int, name: str) -> None:
    """Raise ValueError if an N:M pattern does not divide the inputs of the linear called `name`."""
    if recipe.n_m is not None and in_features % recipe.n_m[1]:
        raise ValueError(
            f"pattern {recipe.pattern} needs in_features divisible by {recipe.n_m[1]}, "
            f"but {name or 'the linear'} has {in_features}"
        )


def relative_error(weight: Tensor, compressed: Tensor, hessian: Tensor) -> float:
    """Squared output error over squared output: tr(D H D') / tr(W H W') with D = weight - compressed."""
    difference = weight - compressed
    error = (difference @ hessian * difference).sum(dtype=torch.float64)
    total = (weight @ hessian * weight).sum(dtype=torch.float64)
    return float(error / total) if float(total) > 0 else 0.0


def _choose_widths(recipe: Recipe, importance: Tensor, weight_t: Tensor, drop: Tensor | None) -> Tensor:
    assert recipe.target_avg_bits is not None
    if recipe.allocation == "uniform":
        return torch.full_like(importance, int(recipe.target_avg_bits), dtype=torch.uint8)
    counts = torch.full_like(importance, weight_t.shape[1]) if drop is None else (~drop).sum(1)
    allocate = allocate_budget if recipe.allocation == "budget" else allocate_quantile
    return allocate(importance, recipe.widths, recipe.target_avg_bits, counts)


def _ordered_sweep(
    weight_t: Tensor,
    factor: InverseFactor,
    order: Tensor | None,
    mask: MaskRule | Tensor | None,
    quantizer: tuple[Tensor, AffineGrid] | None,
    block_size: int,
) -> _Sweep:
    """Sweep the columns in `order`, in which `factor` is already, and return the result in the matrix's own order."""
    if order is None:
        return _sweep(weight_t, factor.hinv_chol, mask, quantizer, block_size)
    if isinstance(mask, Tensor):
        mask = mask[order]
    if quantizer is not None:
        quantizer = (quantizer[0][order], quantizer[1])
    solved = _sweep(weight_t[order], factor.hinv_chol, mask, quantizer, block_size)
    back = torch.argsort(order)
    codes = None if solved.codes is None else solved.codes[back]
    return _Sweep(solved.weight[back], solved.drop[back], codes)


def _sweep(
    weight_t: Tensor,
    hinv_chol: Tensor,
    mask: MaskRule | Tensor | None,
    quantizer: tuple[Tensor, AffineGrid] | None,
    block_size: int,
) -> _Sweep:
    """Solve the columns in order, `[in_features, out_features]` in and out; see the module's docstring.

    Args:
        weight_t: float32 weights, inputs first.
        hinv_chol: upper triangular factor of the inverse Hessian, `[in_features, in_features]`.
        mask: what to remove: given (bool, True where removed), a rule, or nothing.
        quantizer: bits per column with the rows' grid, or None to leave survivors unrounded.
        block_size: columns per block; rounded down to whole N:M groups.
    """
    weight = weight_t.clone(memory_format=torch.contiguous_format)
    columns = weight.shape[0]
    drop = mask.clone() if isinstance(mask, Tensor) else torch.zeros_like(weight, dtype=torch.bool)
    codes = None if quantizer is None else torch.empty_like(weight, dtype=torch.uint8)
    column_bits = [] if quantizer is None else quantizer[0].tolist()
    scales = {} if quantizer is None else {bits: quantizer[1].at(bits) for bits in set(column_bits)}
    n_m = mask.n_m if isinstance(mask, MaskRule) else None
    if n_m:
        block_size = max(block_size - block_size % n_m[1], n_m[1])
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block, factor = weight[start:stop], hinv_chol[start:stop, start:stop]
        diagonal = factor.diagonal()
        if isinstance(mask, MaskRule) and not n_m:
            # The running total of removals is rounded, not each block's: k of the whole matrix is exact.
            size = weight.shape[1]
            k = round(mask.sparsity * (stop * size)) - round(mask.sparsity * (start * size))
            drop[start:stop] = lowest((block / diagonal[:, None]).square(), k)
        errors = torch.empty_like(block)
        for i in range(stop - start):
            if n_m and i % n_m[1] == 0:
                group = slice(i, i + n_m[1])
                drop[start:stop][group] = lowest_n_of_m((block[group] / diagonal[group, None]).square(), *n_m)
            stored = block[i].masked_fill(drop[start + i], 0)
            if codes is not None:
                bits = column_bits[start + i]
                scale, zero_point = scales[bits]
                code = quantize(stored, scale, zero_point, bits)
                codes[start + i] = code
                stored = dequantize(code, scale, zero_point)
            torch.div(block[i] - stored, diagonal[i], out=errors[i])
            block[i] = stored
            block[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        weight[stop:].addmm_(hinv_chol[start:stop, stop:].T, errors, alpha=-1)
    return _Sweep(weight, drop, codes)
