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

from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.core.problem import InputProblem, SharedInput
from sgpt_lightning.presets import Parts


@dataclass(frozen=True)
class Objective:
    """tr((Q - target) H (Q - target)') over Q `[out_features, in_features]`, H being the input's."""

    input: InputProblem
    """Hessian, factor and means, shared with all linears that receive the input."""
    weight: Tensor
    """The dense weight, float32 `[out_features, in_features]`."""
    target: Tensor
    """What Q should come close to, same shape."""
    gap_mean: Tensor | None
    """E[g], float32 `[out_features]`, if a bias takes over the mean and the stream has a gap."""

    def bias_shift(self, compressed: Tensor) -> Tensor | None:
        """Return what to add to the bias, W mu* - Q mu + E[g], `[out_features]`; None if there is no bias to move."""
        mean, dense_mean = self.input.mean, self.input.dense_mean
        if mean is None or dense_mean is None:
            return None
        shift = self.weight @ dense_mean - compressed @ mean
        return shift if self.gap_mean is None else shift + self.gap_mean

    def relative_error(self, compressed: Tensor) -> float:
        """Squared output error as a fraction of the squared output: tr(D H D') / tr(W H W') with D = W - Q.

        No error is 0 also where there is no output; an error where there was no output is inf, and NaN stays NaN.
        """
        error, total = self.row_errors(compressed).sum(), _row_energies(self.weight, self.input.hessian).sum()
        return 0.0 if float(error) == 0 else float(error / total)

    def row_errors(self, compressed: Tensor) -> Tensor:
        """Return the mean squared error of each output, E[e_r^2] over tokens, float64 `[out_features]`."""
        return _row_energies(self.weight - compressed, self.input.hessian)


def _row_energies(matrix: Tensor, hessian: Tensor) -> Tensor:
    return (matrix @ hessian * matrix).sum(1, dtype=torch.float64)


def make_objective(
    weight: Tensor,
    inputs: InputStatistics | SharedInput,
    parts: Parts,
    *,
    has_bias: bool,
    damp_percent: float = 0.01,
    name: str = "",
) -> Objective:
    """Build the objective of one linear.

    Args:
        weight: dense weight, float32 `[out_features, in_features]`.
        inputs: what the linear receives; with the dense model's inputs if `parts.alpha` is to count.
        parts: `centre` and `alpha` are read.
        has_bias: whether the linear has a bias.
        damp_percent: damping as a fraction of the mean Hessian diagonal.
        name: the linear, for error messages.

    Raises:
        ValueError: the linear saw no token.
        HessianError: the Hessian cannot be inverted.
    """
    shared = SharedInput.of(inputs)
    problem = shared.problem(centred=parts.centre and has_bias, damp_percent=damp_percent, name=name)
    gap, gap_mean = shared.statistics.gap_moment, None
    if problem.mean is not None and gap is not None and shared.statistics.gap_mean is not None:
        gap_mean = shared.statistics.gap_mean.float()
        gap = gap - torch.outer(gap_mean, problem.mean)
    dead = problem.factor.dead
    free = torch.where(dead, 0, weight)
    target = free
    if problem.damped_cross is not None and parts.alpha > 0:
        target = torch.lerp(free, free @ problem.damped_cross @ problem.inverse, parts.alpha)
        if gap is not None:
            target += parts.stream_alpha * (gap @ problem.inverse)
        target = torch.where(dead, 0, target)
    return Objective(problem, weight, target, gap_mean)
