"""Input channels in groups that tell about each other: mutual information, spectral groups, a width for each group.

The mutual information of two channels is taken as if they were jointly normal (Cover and Thomas, Elements of
Information Theory, 2006, section 8.5): I_ij = -1/2 ln(1 - r2_ij), in nats, r2 being the squared correlation, which n
tokens overestimate by about 1 / n, so that is taken off. Only moments are needed that the solve has anyway; what sign
or positive scale a channel has does not matter.

Groups are spectral (Ng, Jordan and Weiss, On spectral clustering, NIPS 2001): rows of the top eigenvectors of the
normalised affinity, at unit length, clustered by k-means from k-means++ starts (Arthur and Vassilvitskii, SODA 2007).
Their number is given, or is the one of the highest silhouette (Rousseeuw, J. Comput. Appl. Math. 20, 1987).

Left out: information that only ranks show, which needs tokens and not moments.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sgpt_lightning.core.allocation import choose_points
from sgpt_lightning.core.moments import InputStatistics

COUNTS = (2, 4, 8, 16, 32)
"""Numbers of groups that `auto` chooses from."""
STARTS, STEPS = 10, 100
"""Of k-means."""
_MOST = 1 - 2.0**-20
"""The highest squared correlation: 6.9 nats."""


def pair_information(statistics: InputStatistics) -> Tensor:
    """Return the mutual information of all pairs of channels, nats, float64 `[in_features, in_features]`.

    The diagonal is 0, and so is all that concerns a channel that does not vary.

    Raises:
        ValueError: fewer than two tokens were seen.
    """
    tokens = statistics.tokens
    if tokens < 2:
        raise ValueError(f"mutual information needs the moments of two tokens at least, got {tokens}")
    mean, variance = statistics.mean, statistics.variance
    scale = torch.where(variance > 0, variance.rsqrt(), 0)
    correlation = (statistics.second_moment.double() - torch.outer(mean, mean)) * scale * scale[:, None]
    squared = ((correlation.square() - 1 / tokens) / (1 - 1 / tokens)).clamp_(0, _MOST)
    return squared.neg_().log1p_().mul_(-0.5).fill_diagonal_(0)


def group_channels(
    statistics: InputStatistics, count: int | Literal["auto"], seed: int = 0, *, dead_apart: bool = True
) -> Tensor:
    """Put the channels of an input into groups by their mutual information.

    Args:
        statistics: what the channels looked like.
        count: groups at most, or `auto` for the number in `COUNTS` of the highest silhouette.
        seed: of the starts of k-means; the global generator is left alone.
        dead_apart: whether channels that do not vary are a group of their own, or go with one of the others.

    Returns:
        The group of each channel, from 0 in the order of their first channels, int64 `[in_features]`. A group of fewer
        than max(8, in_features / (4 count)) channels has joined the one that it shares most information with.

    Raises:
        ValueError: `count` is less than 1, or fewer than two tokens were seen.
    """
    if count != "auto" and count < 1:
        raise ValueError(f"count must be at least 1 or auto, got {count}")
    live, information = statistics.variance > 0, pair_information(statistics)
    counts, distances = COUNTS if count == "auto" else (count,), dissimilarity(information)
    best, found = -float("inf"), torch.zeros(len(live), dtype=torch.int64, device=live.device)
    for number, clusters in zip(counts, _spectral(information[live][:, live], counts, seed), strict=True):
        labels = torch.full_like(found, number if dead_apart else 0)
        labels[live] = clusters
        labels = _without_small(labels, information, max(8, len(labels) // (4 * number)))
        quality = silhouette(distances, labels) if len(counts) > 1 else 0.0
        if quality > best:
            best, found = quality, labels
    return _renumbered(found)


def _spectral(information: Tensor, counts: Sequence[int], seed: int) -> Iterator[Tensor]:
    """Yield the clusters for each count, int64 `[channels]`; all channels vary."""
    if not len(information):
        yield from (torch.zeros(0, dtype=torch.int64, device=information.device) for _ in counts)
        return
    degree = information.sum(1)
    root = torch.where(degree > 0, degree.rsqrt(), 0)
    vectors = torch.linalg.eigh(information * root * root[:, None]).eigenvectors.flip(1)
    # K-means draws by position: ordered by what does not depend on the channels' order, it draws the same ones.
    order = degree.argsort(descending=True, stable=True)
    for count in counts:
        rows = torch.nn.functional.normalize(vectors[:, :count], dim=1)
        yield torch.empty_like(order).index_copy_(0, order, k_means(rows[order], count, seed))


def k_means(points: Tensor, count: int, seed: int = 0) -> Tensor:
    """Cluster points, keeping the best of `STARTS` runs from k-means++ starts.

    Args:
        points: float64 `[points, dimensions]`.
        count: clusters at most; there are fewer where there are fewer different points.
        seed: of a generator of its own.

    Returns:
        The cluster of each point, int64 `[points]`.
    """
    generator = torch.Generator().manual_seed(seed)
    least, best = float("inf"), torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for _ in range(STARTS):
        centres = _spread_out(points, count, generator)
        labels = best.new_full((len(points),), -1)
        for _ in range(STEPS):
            before, labels = labels, _squared_distances(points, centres).argmin(1)
            if torch.equal(before, labels):
                break
            inside = torch.nn.functional.one_hot(labels, len(centres)).to(points)
            sizes = inside.sum(0)[:, None]
            centres = torch.where(sizes > 0, inside.T @ points / sizes.clamp_min(1), centres)
        inertia = float((points - centres[labels]).square().sum())
        if inertia < least:
            least, best = inertia, labels
    return best


def _spread_out(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return up to `count` points as centres, each drawn in proportion to its squared distance from those before."""
    first = int(torch.randint(len(points), (), generator=generator))
    centres = points[first : first + 1]
    while len(centres) < count:
        distances = _squared_distances(points, centres).amin(1).cpu()
        distances = torch.where(distances > 1e-12, distances, 0)
        if not bool(distances.any()):
            break
        drawn = int(torch.multinomial(distances, 1, generator=generator))
        centres = torch.cat([centres, points[drawn : drawn + 1]])
    return centres


def _squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    return (points.square().sum(1)[:, None] - 2 * points @ centres.T + centres.square().sum(1)).clamp_min_(0)


def _without_small(labels: Tensor, information: Tensor, least: int) -> Tensor:
    """Let groups of fewer than `least` channels, smallest first, join the one of the highest mean information."""
    while True:
        inside = torch.nn.functional.one_hot(labels).to(information)
        sizes = inside.sum(0)
        present = torch.where(sizes > 0, sizes, torch.inf)
        smallest = int(present.argmin())
        if present[smallest] >= least or int((sizes > 0).sum()) == 1:
            return labels
        shared = (inside[:, smallest] @ information @ inside) / sizes.clamp_min(1)
        shared[(sizes == 0) | (torch.arange(len(sizes), device=sizes.device) == smallest)] = -1
        labels = torch.where(labels == smallest, int(shared.argmax()), labels)


def _renumbered(labels: Tensor) -> Tensor:
    """Return the same groups, numbered from 0 in the order of their first channels."""
    _, labels = labels.unique(return_inverse=True)
    firsts = (labels == torch.arange(int(labels.max()) + 1, device=labels.device)[:, None]).int().argmax(1)
    return firsts.argsort().argsort()[labels]


def dissimilarity(information: Tensor) -> Tensor:
    """Return sqrt(1 - r2) = e^-I: 1 for channels that say nothing of each other, 0 for the same; shape as given."""
    return (-information).exp().fill_diagonal_(0)


def silhouette(distances: Tensor, labels: Tensor) -> float:
    """Return the mean silhouette of a clustering, in [-1, 1]; 0 where there is one cluster.

    Args:
        distances: symmetric, zero on the diagonal, float `[points, points]`.
        labels: the cluster of each point, int64 `[points]`.
    """
    labels = labels.unique(return_inverse=True)[1]
    inside = torch.nn.functional.one_hot(labels).to(distances)
    sizes = inside.sum(0)
    if len(sizes) == 1:
        return 0.0
    sums = distances @ inside
    own = labels[:, None]
    within = sums.gather(1, own)[:, 0] / (sizes[labels] - 1).clamp_min(1)
    nearest = (sums / sizes).scatter(1, own, torch.inf).amin(1)
    value = (nearest - within) / torch.maximum(nearest, within).clamp_min(torch.finfo(distances.dtype).tiny)
    return float(torch.where(sizes[labels] > 1, value, 0).mean())


def inside_and_between(information: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean information of pairs of channels in one group, and of pairs in two; NaN where there is none."""
    together = labels[:, None] == labels
    other = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return float(information[together & other].mean()), float(information[~together].mean())


def allocate_groups(scores: Tensor, widths: Sequence[int], target: float, counts: Tensor, *, groups: Tensor) -> Tensor:
    """Give every group one width so that sum_g (sum_j s_j^2) 4^-b_g is least, exactly, within the budget.

    What the budget has left then goes to one group, whose most sensitive channels take the next width.

    Args:
        scores: s_j, `[in_features]`.
        widths: allowed widths in bits, ascending.
        target: mean bits per stored weight, between the first and the last width.
        counts: stored weights per channel, `[in_features]`.
        groups: the group of each channel, int64 `[in_features]`, without gaps.

    Returns:
        Bits per channel, uint8 `[in_features]`.
    """
    squared, cost = (values.double().cpu().numpy() for values in (scores.double().square(), counts))
    group, ladder = groups.cpu().numpy(), np.asarray(widths, dtype=float)
    losses = np.bincount(group, squared)[:, None] * 4.0**-ladder
    bits = np.bincount(group, cost)[:, None] * ladder
    budget = target * cost.sum()
    level = np.array(choose_points(list(bits), list(losses), budget))
    left = budget - bits[np.arange(len(bits)), level].sum()
    chosen = level[group]
    chosen[_that_still_fit(squared, cost, group, level, ladder, left)] += 1
    return torch.tensor(np.asarray(widths)[chosen], dtype=torch.uint8, device=scores.device)


def _that_still_fit(
    squared: np.ndarray, cost: np.ndarray, group: np.ndarray, level: np.ndarray, ladder: np.ndarray, left: float
) -> np.ndarray:
    """Return the channels of one group that take the next width for what is left of the budget, those of most gain."""
    best, found = 0.0, np.zeros(0, dtype=int)
    for number, rung in enumerate(level):
        if rung + 1 == len(ladder):
            continue
        members = np.flatnonzero(group == number)
        members = members[np.argsort(-squared[members], kind="stable")]
        prices = np.cumsum(cost[members]) * (ladder[rung + 1] - ladder[rung])
        fitting = members[: np.searchsorted(prices, left * (1 + 1e-9), side="right")]
        gain = squared[fitting].sum() * (4.0 ** -ladder[rung] - 4.0 ** -ladder[rung + 1])
        if gain > best:
            best, found = gain, fitting
    return found
