"""Five scores that say how much an input channel matters; higher is more important.

The scores come from the enhanced SparseGPT fork that this project starts from, with one sign put right: the diagonal
of the inverse Hessian is large for channels that do *not* matter, so its reciprocal is used. 1 / [H^-1]_jj is the
increase of the layer's squared error per squared unit of weight when channel j is removed and the rest adapts
(Optimal Brain Surgeon; SparseGPT, arXiv 2301.00774, section 3.1).
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from sgpt_lightning.presets import ImportanceWeights


class Channels(Protocol):
    """What the scores ask of an input; `InputStatistics` has it."""

    @property
    def mean_abs(self) -> Tensor:
        """E|x|, `[in_features]`."""

    @property
    def variance(self) -> Tensor:
        """Var x, `[in_features]`."""


def channel_scores(weight: Tensor, statistics: Channels, inverse_diagonal: Tensor) -> dict[str, Tensor]:
    """Compute the five scores, each divided by its mean over the channels.

    Args:
        weight: `[out_features, in_features]`.
        statistics: what the linear's input looked like.
        inverse_diagonal: diagonal of the damped inverse Hessian, `[in_features]`.

    Returns:
        `activation`, `hessian`, `weight`, `output`, `stability`, each float64 `[in_features]` with mean 1 (or all
        zero where nothing was measured, as for constant inputs).
    """
    w = weight.double()
    mean_abs = statistics.mean_abs
    raw = {
        "activation": mean_abs,
        "hessian": 1 / inverse_diagonal.double(),
        "weight": w.abs().mean(0),
        "output": (w.square().mean(0) * mean_abs.square()).sqrt(),
        "stability": statistics.variance,
    }
    return {name: score / score.mean().clamp_min(torch.finfo(torch.float64).tiny) for name, score in raw.items()}


def channel_importance(
    weight: Tensor, statistics: Channels, inverse_diagonal: Tensor, weights: ImportanceWeights
) -> Tensor:
    """Return the weighted sum of the five scores, float64 `[in_features]`; arguments as for `channel_scores`."""
    return weighted_sum(channel_scores(weight, statistics, inverse_diagonal), weights)


def weighted_sum(scores: Mapping[str, Tensor], weights: ImportanceWeights) -> Tensor:
    """Return the sum of what `channel_scores` gave, each times its weight, float64 `[in_features]`."""
    return torch.stack([getattr(weights, name) * score for name, score in scores.items()]).sum(0)
