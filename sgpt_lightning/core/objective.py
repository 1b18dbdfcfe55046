"""What a solve minimises: the target weight, the Hessian around the mean, and what the bias takes over.

A linear W of the dense model answers W x* + b; the compressed one, fed with what it really receives, Q x + b'. With
n tokens, mu = E[x], mu* = E[x*]:

- the bias is free of charge, so b' = b + W mu* - Q mu is the best one for any Q, and what is left to minimise is
  tr((Q - W~) H (Q - W~)') + const with H = E[x x'] - mu mu' (centring; without a bias H = E[x x']);
- the minimum over all Q is W~ = W (K + dI)(H + dI)^-1 with K = E[x* x'] - mu* mu' and d the damping, which holds W~
  at W where the inputs say nothing. This is the normal equation of regression on the dense model's outputs.

A linear whose output is added to the residual stream can answer for the stream's error g = r* - r too: then
W~ = (W (K + dI) + E[g x'] - E[g] mu')(H + dI)^-1, and the bias takes over E[g].

W~ follows the noise of the calibration text too, so the target is W + alpha (W~ - W). alpha = 0.5 was best of 0, 0.5
and 1 on text that calibration did not come from. alpha = 0 is the classical target, W itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sgpt_lightning.core.hessian import InverseFactor, inverse_factor
from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.recipe import Parts


@dataclass(frozen=True)
class Objective:
    """tr((Q - target) hessian (Q - target)') over Q `[out_features, in_features]`."""

    weight: Tensor
    """The dense weight, float32 `[out_features, in_features]`."""
    target: Tensor
    """What Q should come close to, same shape."""
    hessian: Tensor
    """Undamped, float32 `[in_features, in_features]`."""
    factor: InverseFactor
    """Of the damped Hessian."""
    mean: Tensor | None
    """E[x], float32 `[in_features]`, if a bias takes over the mean."""
    dense_mean: Tensor | None
    """E[x*], float32 `[in_features]`, if a bias takes over the mean."""
    gap_mean: Tensor | None
    """E[g], float32 `[out_features]`, if a bias takes over the mean and the stream has a gap."""

    @property
    def damped(self) -> Tensor:
        """The damped Hessian, float32 `[in_features, in_features]`; dead inputs have the mean diagonal."""
        return self.factor.damped(self.hessian)

    def bias_shift(self, compressed: Tensor) -> Tensor | None:
        """Return what to add to the bias, W mu* - Q mu + E[g], `[out_features]`; None if there is no bias to move."""
        if self.mean is None or self.dense_mean is None:
            return None
        shift = self.weight @ self.dense_mean - compressed @ self.mean
        return shift if self.gap_mean is None else shift + self.gap_mean

    def relative_error(self, compressed: Tensor) -> float:
        """Squared output error as a fraction of the squared output: tr(D H D') / tr(W H W') with D = W - Q.

        No error is 0 also where there is no output; an error where there was no output is inf, and NaN stays NaN.
        """
        difference = self.weight - compressed
        error = (difference @ self.hessian * difference).sum(dtype=torch.float64)
        total = (self.weight @ self.hessian * self.weight).sum(dtype=torch.float64)
        return 0.0 if float(error) == 0 else float(error / total)


def make_objective(
    weight: Tensor,
    statistics: InputStatistics,
    parts: Parts,
    *,
    has_bias: bool,
    damp_percent: float = 0.01,
    name: str = "",
) -> Objective:
    """Build the objective of one linear.

    Args:
        weight: dense weight, float32 `[out_features, in_features]`.
        statistics: what the linear receives; with the dense model's inputs if `parts.alpha` is to count.
        parts: `centre` and `alpha` are read.
        has_bias: whether the linear has a bias.
        damp_percent: damping as a fraction of the mean Hessian diagonal.
        name: the linear, for error messages.

    Raises:
        ValueError: the linear saw no token.
        HessianError: the Hessian cannot be inverted.
    """
    if statistics.tokens == 0:
        raise ValueError(f"{name or 'the linear'} saw no token during calibration")
    hessian, cross, gap = statistics.second_moment, statistics.cross_moment, statistics.gap_moment
    mean = dense_mean = gap_mean = None
    if parts.centre and has_bias:
        mean, dense_mean = statistics.mean.float(), statistics.dense_mean.float()
        # A constant input has no variance left but rounding: it counts as dead, and the bias takes over what it gave.
        constant = statistics.variance == 0
        hessian = (hessian - torch.outer(mean, mean)).masked_fill(constant | constant[:, None], 0)
        cross = None if cross is None else (cross - torch.outer(dense_mean, mean)).masked_fill(constant, 0)
        if gap is not None and statistics.gap_mean is not None:
            gap_mean = statistics.gap_mean.float()
            gap = gap - torch.outer(gap_mean, mean)
    factor = inverse_factor(hessian, damp_percent, name)
    dead = factor.dead
    free = torch.where(dead, 0, weight)
    target = free
    if cross is not None and parts.alpha > 0:
        damped_cross = cross.clone()
        damped_cross.diagonal().add_(factor.damped(hessian).diagonal() - hessian.diagonal())
        inverse = factor.inverse()
        target = torch.lerp(free, free @ damped_cross @ inverse, parts.alpha)
        if gap is not None:
            target += parts.stream_alpha * (gap @ inverse)
        target = torch.where(dead, 0, target)
    return Objective(weight, target, hessian, factor, mean, dense_mean, gap_mean)
