"""What the linears that receive one input share, made once and on first use: q, k and v have one Hessian to factor.

Everything here depends on the input alone, for a way to centre and to damp it: the Hessian around the mean, the factor
of its inverse, the order of the columns and the factor in that order.
"""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.core.hessian import InverseFactor, check_finite, inverse_factor
from sgpt_lightning.core.moments import InputStatistics


class Columns(NamedTuple):
    """The columns in the order of the loops."""

    order: Tensor | None
    """Positions in the matrix, or None for the matrix's own order."""
    factor: InverseFactor
    """Of the damped Hessian, in that order."""

    def take(self, matrix: Tensor) -> Tensor:
        """Return `[out_features, in_features]` as `[in_features, out_features]` in the loop's order."""
        return matrix.T if self.order is None else matrix.T[self.order]

    def put_back(self, matrix_t: Tensor) -> Tensor:
        """Undo `take`."""
        back = matrix_t if self.order is None else torch.empty_like(matrix_t).index_copy_(0, self.order, matrix_t)
        return back.T.contiguous()

    def permuted(self, hessian: Tensor) -> Tensor:
        """Return `[in_features, in_features]` in the loop's order."""
        return hessian if self.order is None else hessian[self.order][:, self.order]


class InputProblem:
    """The part of a solve that depends on the input alone.

    Args:
        statistics: what the linears receive.
        centred: whether a bias takes over the mean, so that the Hessian is taken around it.
        damp_percent: damping as a fraction of the mean Hessian diagonal.
        name: a linear that receives the input, for error messages.

    Raises:
        ValueError: no token was seen.
        HessianError: the Hessian cannot be inverted; raised when the factor is first asked for.
    """

    def __init__(self, statistics: InputStatistics, *, centred: bool, damp_percent: float, name: str = "") -> None:
        if statistics.tokens == 0:
            raise ValueError(f"{name or 'the linear'} saw no token during calibration")
        self.statistics = statistics
        self.damp_percent = damp_percent
        self.name = name
        self.mean = statistics.mean.float() if centred else None
        """E[x], float32 `[in_features]`, if a bias takes over the mean."""
        self.dense_mean = statistics.dense_mean.float() if centred else None
        """E[x*], float32 `[in_features]`, if a bias takes over the mean."""
        self._constant = statistics.variance == 0 if centred else None

    @cached_property
    def hessian(self) -> Tensor:
        """Undamped, float32 `[in_features, in_features]`; HessianError if a moment is not finite."""
        moment = self.statistics.second_moment
        # Before anything is masked: an input that overflowed is no constant one.
        check_finite(torch.isfinite(moment).all() & torch.isfinite(self.statistics.variance).all(), self.name)
        if self.mean is None or self._constant is None:
            return moment
        # A constant input has no variance left but rounding: it counts as dead, and the bias takes over what it gave.
        centred = moment - torch.outer(self.mean, self.mean)
        return centred.masked_fill(self._constant | self._constant[:, None], 0)

    @cached_property
    def factor(self) -> InverseFactor:
        """Of the damped Hessian, in the matrix's own order."""
        return inverse_factor(self.hessian, self.damp_percent, self.name)

    @cached_property
    def damped(self) -> Tensor:
        """The damped Hessian, float32 `[in_features, in_features]`; dead inputs have the mean diagonal."""
        return self.factor.damped(self.hessian)

    @cached_property
    def inverse(self) -> Tensor:
        """The inverse of the damped Hessian, float32 `[in_features, in_features]`."""
        return self.factor.inverse()

    @cached_property
    def damped_cross(self) -> Tensor | None:
        """K + dI, float32 `[in_features, in_features]`; None if the uncompressed model was not run."""
        cross = self.statistics.cross_moment
        if cross is None:
            return None
        if self.mean is not None and self.dense_mean is not None and self._constant is not None:
            cross = (cross - torch.outer(self.dense_mean, self.mean)).masked_fill(self._constant, 0)
        damped = cross.clone()
        damped.diagonal().add_(self.damped.diagonal() - self.hessian.diagonal())
        return damped

    @cached_property
    def natural(self) -> Columns:
        """The columns in their own order."""
        return Columns(None, self.factor)

    @cached_property
    def act_ordered(self) -> Columns:
        """The columns with the largest Hessian diagonal first."""
        order = torch.argsort(self.hessian.diagonal(), descending=True, stable=True)
        factor = inverse_factor(self.hessian[order][:, order], self.factor.damp_percent, self.name)
        return Columns(order, factor)


class SharedInput:
    """An input that several linears receive, with the problems that were made of it so far.

    Args:
        statistics: what the linears receive; not to be added to any more.
    """

    def __init__(self, statistics: InputStatistics) -> None:
        self.statistics = statistics
        self._problems: dict[tuple[bool, float], InputProblem] = {}

    @classmethod
    def of(cls, inputs: "InputStatistics | SharedInput", known: "SharedInput | None" = None) -> "SharedInput":
        """Wrap statistics, unless they are wrapped already or `known` wraps them (q, k and v stand side by side)."""
        if isinstance(inputs, SharedInput):
            return inputs
        return known if known is not None and known.statistics is inputs else cls(inputs)

    def problem(self, *, centred: bool, damp_percent: float, name: str = "") -> InputProblem:
        """Return the problem for a way to centre and damp, made at the first call; arguments as `InputProblem`."""
        key = (centred, damp_percent)
        if key not in self._problems:
            self._problems[key] = InputProblem(self.statistics, centred=centred, damp_percent=damp_percent, name=name)
        return self._problems[key]
