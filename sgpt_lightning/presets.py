"""The parts of the solve by name, the presets that combine them (published methods and our own), and score weights."""

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

from sgpt_lightning.arguments import check_choice, check_type

Allocation = Literal["uniform", "quantile", "budget", "loss", "rows"]

Preset = Literal["best", "sparsegpt", "gptq"]


@dataclass(frozen=True)
class Parts:
    """The parts of the solve; the values here are those of the preset `best`, 0 and False switch a part off."""

    centre: bool = True
    """Let the bias carry the mean of the error, and solve for what varies (linears that have a bias)."""
    alpha: float = 0.5
    """How far the target moves from the weight (0) towards the best answer to the dense model's outputs (1)."""
    stream_alpha: float = 0.5
    """The same for the error that the residual stream already has where a linear writes into it; needs `alpha` > 0."""
    gradients: bool = True
    """Weigh the rows of a linear by what their error costs the model's loss (one backward pass of the dense model)."""
    true_sequential: bool = True
    """Collect the inputs of a block's linears anew when those before them are compressed."""
    act_order: bool = True
    """Solve the columns with the largest Hessian diagonal first."""
    mask_steps: int = 30
    """Steps of ADMM that choose the mask; without, a sweep chooses it."""
    refit_steps: int = 20
    """Steps of conjugate gradient that fit the survivors to the mask."""
    zero_free: bool = True
    """Spend no code on zero where a mask says what is zero."""
    range_search: bool = True
    """Search the range of each row instead of taking its minimum and maximum."""
    descent_passes: int = 1
    """Passes of coordinate descent over the codes, ranges refitted after each."""

    def __post_init__(self) -> None:
        """Raise ValueError naming the part and the value."""
        for name in ("alpha", "stream_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"parts.{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("mask_steps", "refit_steps", "descent_passes"):
            if getattr(self, name) < 0:
                raise ValueError(f"parts.{name} must not be negative, got {getattr(self, name)}")


class _PresetValues(NamedTuple):
    parts: Parts
    sparsity: float
    allocation: Allocation


_PAPER = Parts(
    centre=False,
    alpha=0.0,
    stream_alpha=0.0,
    gradients=False,
    true_sequential=False,
    act_order=False,
    mask_steps=0,
    refit_steps=0,
    zero_free=False,
    range_search=False,
    descent_passes=0,
)

PRESETS: dict[Preset, _PresetValues] = {
    "best": _PresetValues(Parts(), 0.5, "rows"),
    "sparsegpt": _PresetValues(_PAPER, 0.5, "uniform"),
    "gptq": _PresetValues(_PAPER, 0.0, "uniform"),
}


@dataclass(frozen=True)
class ImportanceWeights:
    """How much each of the five channel scores counts; non-negative and summing to 1."""

    activation: float = 0.25
    """Mean absolute input of the channel."""
    hessian: float = 0.25
    """1 / [H^-1]_jj: what the objective loses when the channel is removed."""
    weight: float = 0.15
    """Mean absolute weight of the column."""
    output: float = 0.25
    """Root mean square of the column times the channel's mean absolute input."""
    stability: float = 0.10
    """Variance of the channel's input."""

    def __post_init__(self) -> None:
        """Raise ValueError on a negative weight or a sum other than 1."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        negative = {name: value for name, value in values.items() if not value >= 0}
        if negative:
            raise ValueError(f"importance weights must not be negative, got {negative}")
        if not math.isclose(sum(values.values()), 1.0, abs_tol=1e-6):
            raise ValueError(f"importance weights must sum to 1, got {sum(values.values()):g} from {values}")


ScalingMode = Literal["none", "search", "fixed"]


@dataclass(frozen=True)
class Scaling:
    """Scales of input channels, d_j = (E|x_j| / max_i |W_ij|)^alpha, before weights are rounded; 16 bits each.

    Only what is quantized to fixed widths has them: they change nothing about pruning.
    """

    mode: ScalingMode = "none"
    """`none`; `fixed`: one alpha; `search`: for each linear the alpha of 0, 0.1 ... 1 that leaves the least error, by
    eleven solves. No scales are stored where it is 0."""
    alpha: float | None = None
    """The exponent of the mode `fixed`, from 0 to 1."""
    fold: bool = False
    """Round scales to powers of two, and let linears that receive one input share them, so that `compress` can give
    them to what makes the input, exactly and free of bytes, where that is found to work (`calibration/folding.py`). A
    budget counts them all the same."""

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError naming the setting and the value."""
        check_choice("scaling.mode", self.mode, ScalingMode)
        check_type("scaling.alpha", self.alpha, (int, float))
        if type(self.fold) is not bool:
            raise TypeError(f"scaling.fold must be true or false, got {self.fold!r}")
        if (self.alpha is None) == (self.mode == "fixed"):
            raise ValueError(f"scaling.alpha goes with mode fixed and with no other, got {self.alpha} and {self.mode}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"scaling.alpha must be in [0, 1], got {self.alpha}")

    def refuse_with_steps(self) -> None:
        """Raise ValueError if scales are asked for where each channel has a step of its own."""
        if self.mode != "none":
            raise ValueError(
                "scaling belongs to coding fixed: with coding entropy every input channel has a step of its own, "
                f"which is a scale already, got scaling.mode={self.mode}"
            )
