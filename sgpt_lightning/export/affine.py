"""A packed weight as whole numbers times one scale per row or group, value for value, or why that cannot be.

Integer formats hold `(code - zero_point) * scale`, one product in the dtype of the scale. Of our grids (see
`format/packing.py`) `zero-point` is that, whatever the width of a row: with d = code - zero_point, a row's values are
fl(step * d), and its own step is the scale, so more bits than it needs change nothing. Nothing is taken on trust:
every value is multiplied out again and must be equal.

Not of that form are `offset` and `zero-free` (a sum after the product), rate-coded weights (a step per input channel),
input channels with scales, and rows whose columns have several widths: their steps span / 3, span / 15 are rounded one
by one and have no common divisor in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.core.grids import top_step
from sgpt_lightning.format.layout import PackedWeight

MOST_LEVELS = 256
"""Of whole numbers in a row or group: what 8 bits tell apart."""


class NotAffineError(ValueError):
    """A weight that no whole numbers times a scale express exactly; the message says why."""


class Affine(NamedTuple):
    """A weight as `differences * scale`, rounded once to the dtype of the scale."""

    differences: Tensor
    """d, int16 `[out_features, in_features]`."""
    scale: Tensor
    """`[out_features, groups]`, in the dtype of the weight."""
    group_size: int | None
    """Columns per scale; None for the whole row."""

    def weight(self) -> Tensor:
        """Return the values, in the dtype of the scale `[out_features, in_features]`."""
        grouped = self.differences.view(*self.scale.shape, -1).to(self.scale.dtype)
        return (grouped * self.scale[..., None]).view(self.differences.shape)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return the lowest and highest d of each group, zero always between them, int16 `[out_features, groups]`."""
        grouped = self.differences.view(*self.scale.shape, -1)
        return grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)


def affine_form(packed: PackedWeight, weight: Tensor) -> Affine:
    """Express a weight by whole numbers and scales.

    Args:
        packed: the stored form, whose ranges give the scales.
        weight: the values to keep, `[out_features, in_features]` in the dtype that the scales shall have.

    Raises:
        NotAffineError: there is no such form with these scales.
    """
    _check_kind(packed)
    widths, group_size = packed.spec.widths, packed.spec.group_size
    assert widths is not None
    span = packed.tensors["weight_range"].float()
    pieces = weight.reshape(*span.shape, -1)
    scale = torch.ones(span.shape, dtype=weight.dtype)
    differences = torch.zeros(pieces.shape, dtype=torch.int16)
    left = torch.ones(span.shape, dtype=torch.bool)
    for bits in widths:
        step = (span / torch.full_like(span, max(top_step("zero-point", bits), 1))).to(weight.dtype)
        whole = (pieces.float() / step.float()[..., None]).round_().clamp_(-MOST_LEVELS, MOST_LEVELS)
        exact = (whole.to(weight.dtype) * step[..., None] == pieces).all(-1)
        taken = left & exact & (whole.amax(-1).clamp_min(0) - whole.amin(-1).clamp_max(0) < MOST_LEVELS)
        scale = torch.where(taken, step, scale)
        differences[taken] = whole[taken].to(torch.int16)
        left &= ~taken
    if bool(left.any()):
        raise NotAffineError(_why_not(packed, weight.dtype))
    return Affine(differences.view(weight.shape), scale, group_size)


def _check_kind(packed: PackedWeight) -> None:
    spec = packed.spec
    if spec.layout == "coded":
        raise NotAffineError("rate-coded: every input channel has a step of its own")
    if spec.widths is None:
        raise NotAffineError("pruned and not quantized")
    if spec.scaled:
        raise NotAffineError("its input channels have scales")
    if spec.grid != "zero-point":
        raise NotAffineError(f"its grid is `{spec.grid}`, which adds an offset after the product")
    if spec.group_size is not None and spec.shape[1] % spec.group_size:
        raise NotAffineError(f"groups of {spec.group_size} do not divide its {spec.shape[1]} inputs")


def _why_not(packed: PackedWeight, dtype: torch.dtype) -> str:
    """Return a reason without figures, so that linears can be counted by it."""
    spec = packed.spec
    assert spec.widths is not None
    if len(spec.widths) > 1 and spec.width_axis == "input":
        return f"its columns have several widths, whose steps have no common divisor in {_name(dtype)}"
    remedy = "" if dtype == torch.float32 else ", which the dtype float32 has"
    return f"some of its rows have no exact scale in {_name(dtype)}{remedy}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
