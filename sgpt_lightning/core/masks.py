"""Which weights go: exactly k of them, by position and never by threshold.

A threshold (`score <= sorted[k]`, as in the published SparseGPT code) removes one weight too many, and everything
on ties; at a sparsity of 0 it still removes one per block. Here ties are broken by position and k is met exactly.

A mask that a column sweep has chosen can be refined: ADMM alternates between the best weights near a sparse copy and
the best sparse copy of those weights, with a penalty rho that grows until the two agree (ALPS, arXiv 2406.07831,
section 3). Weights and Hessian are scaled by sqrt(diag H) first, so that magnitudes are comparable between channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def lowest(scores: Tensor, k: int) -> Tensor:
    """Mark the k lowest of all scores (any shape); ties go to the earlier position. Returns bool, same shape."""
    if scores.is_cuda:
        return lowest_by_value(scores, k)
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    if k > 0:
        chosen[torch.argsort(scores.reshape(-1), stable=True)[:k]] = True
    return chosen.view(scores.shape)


def lowest_by_value(scores: Tensor, k: int) -> Tensor:
    """Mark what `lowest` marks, by the k-th value and a count of its ties: quicker on a GPU, slower on a CPU."""
    if k <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.reshape(-1)
    last = flat.sort().values[k - 1]
    below, ties = flat < last, flat == last
    counted = ties.cumsum(0, dtype=torch.int32 if flat.numel() < 2**31 else torch.int64)
    return (below | (ties & (counted <= k - below.sum()))).view(scores.shape)


def lowest_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Mark the n lowest of every m consecutive rows, column by column.

    Args:
        scores: `[in_features, out_features]` (inputs first, as the sweep holds them), in_features divisible by m.
        n: how many of each group to mark.
        m: group size.

    Returns:
        bool `[in_features, out_features]`.
    """
    grouped = scores.reshape(len(scores) // m, m, scores.shape[-1])
    order = torch.argsort(grouped, dim=1, stable=True)
    chosen = torch.zeros_like(grouped, dtype=torch.bool)
    return chosen.scatter_(1, order[:, :n], True).view(scores.shape)


class MaskRule(NamedTuple):
    """How many weights go: a fraction of the matrix, or N of every M consecutive inputs."""

    sparsity: float
    n_m: tuple[int, int] | None = None

    def count(self, weights: int) -> int:
        """Return how many of so many weights go."""
        return round(self.sparsity * weights) if self.n_m is None else weights // self.n_m[1] * self.n_m[0]

    def removed(self, scores: Tensor) -> Tensor:
        """Mark what goes by the lowest scores, `[out_features, in_features]`, over the whole matrix."""
        if self.n_m is None:
            return lowest(scores, self.count(scores.numel()))
        return lowest_n_of_m(scores.T, *self.n_m).T

    def removed_up_to_ties(self, scores: Tensor) -> Tensor:
        """Mark what goes as `removed` does, but cut ties by value: quicker, for masks that are not final."""
        k = self.count(scores.numel())
        if self.n_m is not None or k == 0:
            return self.removed(scores)
        if scores.is_cuda:  # selecting runs on one block of the GPU, sorting on all
            return scores <= scores.flatten().sort().values[k - 1]
        return scores <= scores.flatten().kthvalue(k).values


class Spectrum(NamedTuple):
    """Eigenvectors of S H S with S = diag(H)^-1/2."""

    scale: Tensor
    """sqrt(diag H), `[in_features]`."""
    eigenvalues: Tensor
    """`[in_features]`."""
    basis: Tensor
    """One eigenvector a column, `[in_features, in_features]`."""


def scaled_spectrum(hessian: Tensor) -> Spectrum:
    """Decompose a damped Hessian, float32 `[in_features, in_features]`, for `refine_mask`."""
    scale = hessian.diagonal().sqrt()
    return Spectrum(scale, *torch.linalg.eigh(hessian / torch.outer(scale, scale)))


def refine_mask(target: Tensor, spectrum: Spectrum, drop: Tensor, rule: MaskRule, steps: int) -> Tensor:
    """Look for a mask with a smaller error tr((W - T) H (W - T)') over the W that it allows.

    Args:
        target: T, float32 `[out_features, in_features]`.
        spectrum: of the damped H.
        drop: the mask to start from, True where removed, same shape as `target`.
        rule: how many weights go.
        steps: how many times weights and mask alternate, at most.

    Returns:
        bool `[out_features, in_features]`, True where removed.
    """
    scale, eigenvalues, basis = spectrum
    scaled = target * scale
    pull = (scaled @ basis * eigenvalues) @ basis.T
    sparse, dual, rho = scaled.masked_fill(drop, 0), torch.zeros_like(scaled), _FIRST_PENALTY
    previous, wanted = drop, scaled
    for step in range(1, steps + 1):
        free = ((pull - dual + rho * sparse) @ basis / (eigenvalues + rho)) @ basis.T
        wanted = free + dual / rho
        drop = rule.removed_up_to_ties(wanted.abs())
        sparse = wanted.masked_fill(drop, 0)
        dual += rho * (free - sparse)
        if step % 3 == 0:
            changed = float((drop != previous).sum()) / drop.numel()
            if changed == 0:
                break
            rho *= 1.3 if changed > 0.05 else 1.2 if changed > 0.0025 else 1.1
            previous = drop
    return rule.removed(wanted.abs()) if steps else drop


_FIRST_PENALTY = 0.1
