"""Which weights go: exactly k of them, by position and never by threshold.

A threshold (`score <= sorted[k]`, as in the published SparseGPT code) removes one weight too many, and everything
on ties; at a sparsity of 0 it still removes one per block. Here ties are broken by position and k is met exactly.
"""

import torch
from torch import Tensor


def lowest(scores: Tensor, k: int) -> Tensor:
    """Mark the k lowest of all scores (any shape); ties go to the earlier position. Returns bool, same shape."""
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    if k > 0:
        chosen[torch.argsort(scores.reshape(-1), stable=True)[:k]] = True
    return chosen.view(scores.shape)


def lowest_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Mark the n lowest of every m consecutive rows, column by column.

    Args:
        scores: `[in_features, out_features]` (inputs first, as the sweep holds them), in_features divisible by m.
        n: how many of each group to mark.
        m: group size.

    Returns:
        bool `[in_features, out_features]`.
    """
    grouped = scores.reshape(-1, m, scores.shape[-1])
    order = torch.argsort(grouped, dim=1, stable=True)
    chosen = torch.zeros_like(grouped, dtype=torch.bool)
    return chosen.scatter_(1, order[:, :n], True).view(scores.shape)
