"""What a solve leaves of one weight matrix, exactly as it will be stored; what packs and reports it needs no solver."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sgpt_lightning.core.grids import Grid, dequantize_matrix
from sgpt_lightning.core.hessian import DampStatus

SolveStatus = Literal[DampStatus, "rounded"]
"""How a linear came to what is stored: `ok`, with more damping (`damped`) or precision (`float64`) than was asked for,
or not solved but `rounded` plainly, since it could not be solved and the recipe allowed that."""


class SolveError(ValueError):
    """A linear that cannot be solved to finite numbers; the message names it."""


@dataclass(frozen=True)
class Pruned:
    """A matrix whose survivors are values."""

    values: Tensor
    """The weights in the storage dtype, zero where removed, `[out_features, in_features]`."""
    keep: Tensor | None = None
    """True where a weight survives, bool `[out_features, in_features]`. None if nothing was removed."""
    n_m: tuple[int, int] | None = None
    """(N, M) if every M consecutive inputs hold N zeros."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return (self.values.shape[0], self.values.shape[1])

    def weight(self) -> Tensor:
        """Return the matrix that the model computes with, float32 `[out_features, in_features]`."""
        return self.values.float()


@dataclass(frozen=True)
class Quantized:
    """A matrix whose survivors are codes."""

    codes: Tensor
    """uint8 `[out_features, in_features]`; where a weight is removed, that of zero or 0."""
    widths: Tensor
    """Bits per input channel, or per output channel where `grid.axis` says so, uint8."""
    grid: Grid
    """Spans and origins of the rows."""
    keep: Tensor | None = None
    """True where a weight survives, bool `[out_features, in_features]`. None if nothing was removed."""
    n_m: tuple[int, int] | None = None
    """(N, M) if every M consecutive inputs hold N zeros."""
    channel_scale: Tensor | None = None
    """What the columns are multiplied by in the end, float16 `[in_features]` (`scaling.py`); None leaves them."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return (self.codes.shape[0], self.codes.shape[1])

    def weight(self) -> Tensor:
        """Return the matrix that the model computes with, float32 `[out_features, in_features]`."""
        weight = dequantize_matrix(self.codes, self.widths, self.grid)
        if self.keep is not None:
            weight.masked_fill_(~self.keep, 0)
        return weight if self.channel_scale is None else weight.mul_(self.channel_scale.float())


ROW_OCTAVE, STEP_OCTAVE = 8, 16
"""Positions per octave on the logarithmic grids of row scales and of steps."""


def power_of_two(index: Tensor, octave: int) -> Tensor:
    """Return 2^(-index / octave), float32, the same on every device.

    Args:
        index: whole numbers, any integer dtype and shape.
        octave: positions per octave.
    """
    fractions = [2.0 ** (-part / octave) for part in range(octave)]
    table = torch.tensor(fractions, dtype=torch.float32, device=index.device)  # whatever the user's default dtype is
    whole = index.long()
    return torch.ldexp(table[whole % octave], -(whole // octave))


def octave_index(ratio: Tensor, octave: int) -> Tensor:
    """Return the index at which `power_of_two` is nearest to 1 / ratio, uint8; ratios are at least 1."""
    return (octave * ratio.log2()).round_().clamp_(0, 255).to(torch.uint8)


def side_bytes(shape: Sequence[int]) -> int:
    """Return the bytes of what stands beside the codes of a `Coded` matrix: the level, the steps and the row scales."""
    return 4 + sum(shape)


@dataclass(frozen=True)
class Coded:
    """A matrix of whole codes for an entropy coder: q_rc = (k_rc s_c) g_r, rounded to float32 after each product."""

    codes: Tensor
    """k, int32 `[out_features, in_features]`."""
    level: Tensor
    """The coarsest step, float32 `[1]`."""
    steps: Tensor
    """s_c = level 2^(-steps_c / 16), uint8 `[in_features]`."""
    rows: Tensor
    """g_r = 2^(-rows_r / 8), uint8 `[out_features]`."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return (self.codes.shape[0], self.codes.shape[1])

    def step_sizes(self) -> Tensor:
        """Return s, float32 `[in_features]`."""
        return self.level * power_of_two(self.steps, STEP_OCTAVE)

    def weight(self) -> Tensor:
        """Return the matrix that the model computes with, float32 `[out_features, in_features]`."""
        return (self.codes.float() * self.step_sizes()).mul_(power_of_two(self.rows, ROW_OCTAVE)[:, None])


Solution = Pruned | Quantized | Coded
"""What is stored of a matrix."""


@dataclass(frozen=True)
class CompressedLinear:
    """One solved linear: what is stored, and how well it does."""

    solution: Solution
    relative_error: float | None
    """tr((W - Q) H (W - Q)') / tr(W H W'): squared output error as a fraction of the squared output; None where there
    are no inputs to measure it on."""
    importance_range: tuple[float, float]
    """Lowest and highest channel importance."""
    damp_percent: float
    """Damping used, a fraction of the mean Hessian diagonal; 0 where there is no Hessian."""
    status: SolveStatus
    bias_shift: Tensor | None = None
    """What the bias takes over, float32 `[out_features]`; None if the bias stays."""
    allocation: str | None = None
    """How widths were dealt in the end: `uniform` also where it did better than what was asked for."""
    predicted_loss: float | None = None
    """What its error is predicted to add to the model's loss; None where no gradients were taken."""
    failure: str | None = None
    """Why it could not be solved, where it was rounded plainly instead."""
    scaling_alpha: float | None = None
    """The exponent of its channel scales, 0 where none are stored; None where none were asked for."""

    def weight(self) -> Tensor:
        """Return the matrix that the model computes with, float32 `[out_features, in_features]`."""
        return self.solution.weight()
