"""The affine grid of a row: q = scale * (code - zero_point), code in 0 .. 2^bits - 1.

A row stores one range, and every width on that row divides the same range: scale(bits) = range / (2^bits - 1). With
one width this is GPTQ's per-row asymmetric min-max grid (arXiv 2210.17323, section 4). Zero is always on the grid
exactly, so a removed weight can be written as the zero point where no mask is stored.

The range is rounded to the precision in which it is stored before anything is quantized with it, so what the solver
saw and what a reader of the file sees are the same numbers.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def levels(bits: int) -> int:
    """Steps between the lowest and the highest code of a width."""
    return (1 << bits) - 1


class AffineGrid(NamedTuple):
    """One range and one zero point per row, for all widths up to `max_bits`."""

    row_range: Tensor
    """Width of the interval that the codes span, `[out_features]`, float16 (float32 where float16 cannot hold it)."""
    zero_point: Tensor
    """The code that stands for zero at `max_bits`, uint8 `[out_features]`."""
    max_bits: int
    """The widest width in use."""

    def at(self, bits: int) -> tuple[Tensor, Tensor]:
        """Return scale and zero point for one width, both float32 `[out_features]`."""
        row_range = self.row_range.float()
        # Divided by a tensor: by a number, CUDA multiplies with the reciprocal, and a file solved on a GPU would
        # read back differently on a CPU.
        scale = row_range / torch.full_like(row_range, levels(bits))
        zero_point = self.zero_point.float()
        if bits != self.max_bits:
            zero_point = (zero_point * (levels(bits) / levels(self.max_bits))).round()
        return scale, zero_point


def fit_affine_grid(weight: Tensor, max_bits: int) -> AffineGrid:
    """Fit the smallest range per row that holds every weight and zero.

    Args:
        weight: float32 `[out_features, in_features]`, removed weights set to zero.
        max_bits: the widest width that will be used.
    """
    low = weight.amin(1).clamp_max(0)
    high = weight.amax(1).clamp_min(0)
    row_range = high - low
    row_range = torch.where(row_range > 0, row_range, torch.ones_like(row_range))
    half = torch.finfo(torch.float16)
    if bool((row_range >= half.smallest_normal).all() & (row_range <= half.max).all()):
        row_range = row_range.half()
    zero_point = (-low / row_range.float() * levels(max_bits)).round().clamp(0, levels(max_bits))
    return AffineGrid(row_range, zero_point.to(torch.uint8), max_bits)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return the nearest codes as float32, clamped to the width; all arguments broadcast together."""
    return (weight / scale).round_().add_(zero_point).clamp_(0, levels(bits))


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return scale * (codes - zero_point), float32; all arguments broadcast together."""
    return scale * (codes - zero_point)


def dequantize_columns(codes: Tensor, widths: Tensor, grid: AffineGrid) -> Tensor:
    """Turn a whole matrix of codes back into weights.

    Args:
        codes: uint8 `[out_features, in_features]`.
        widths: bits per column, uint8 `[in_features]`.
        grid: the rows' ranges and zero points.

    Returns:
        float32 `[out_features, in_features]`.
    """
    weight = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for bits in torch.unique(widths).tolist():
        columns = widths == bits
        scale, zero_point = grid.at(bits)
        weight[:, columns] = dequantize(codes[:, columns].float(), scale[:, None], zero_point[:, None])
    return weight
