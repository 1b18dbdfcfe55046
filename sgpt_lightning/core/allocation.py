"""From scores or losses and a budget to bit widths per channel, and from channels to a whole model.

Both methods for channels spend at most `target * sum(weights)` bits, where a channel costs its width times the number
of weights that are stored in it (all of them in a dense matrix, the survivors in a pruned one), and stop within one
step of it. A channel is a column for the input scores and a row for measured errors.

`quantile` ranks the channels and cuts the ranking. Cuts at equal fifths of 2/3/4/6/8 would give 4.6 bits whatever was
asked, so the fractions are tilted, share(b) ~ exp(t * b), with t such that the mean is the target: of all divisions
with that mean, this is the one nearest to equal shares (maximum entropy).

`budget` minimises sum_j s_j^2 4^-b_j, the error of a uniform quantizer, by taking the upgrades of highest gain per
bit (the greedy rule is optimal for convex curves up to the last step; Shoham and Gersho, IEEE TASSP 36(9), 1988).

Over a model, each linear offers points (bits, loss) and one of them is taken (`choose_points`): a multiple-choice
knapsack, solved exactly by dynamic programming over budget units (Kellerer, Pferschy and Pisinger, Knapsack Problems,
2004, section 11.5).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

BUDGET_UNITS = 20_000
_ROUNDING = 1e-9


def allocate_quantile(scores: Tensor, widths: Sequence[int], target: float, counts: Tensor) -> Tensor:
    """Cut the ranking of the channels so that the mean width meets the target.

    Args:
        scores: importance, `[in_features]`; equal scores keep the order of their positions.
        widths: allowed widths in bits, ascending.
        target: mean bits per stored weight, between the first and the last width.
        counts: stored weights per channel, `[in_features]`.

    Returns:
        Bits per channel, uint8 `[in_features]`, on the device of `scores`.
    """
    score, cost = _to_numpy(scores), _to_numpy(counts)
    order = np.argsort(-score, kind="stable")
    order = order[cost[order] > 0]
    shares = _tilted_shares(np.asarray(widths, dtype=float), target)[::-1]
    before = np.cumsum(cost[order]) - cost[order]
    cuts = np.cumsum(shares)[:-1] * cost.sum()
    level = np.zeros(len(score), dtype=int)
    level[order] = len(widths) - 1 - np.searchsorted(cuts, before, side="right")
    _settle(level, order, cost, np.asarray(widths), target)
    return _widths_at(level, widths, scores)


def allocate_budget(sensitivity: Tensor, widths: Sequence[int], target: float, counts: Tensor) -> Tensor:
    """Minimise sum_j s_j^2 4^-b_j within the budget; arguments and result as for `allocate_quantile`."""
    squared, cost = np.square(_to_numpy(sensitivity)), _to_numpy(counts)
    ladder = np.asarray(widths, dtype=float)
    stored = np.flatnonzero(cost > 0)
    gain = np.outer(squared[stored], 4.0 ** -ladder[:-1] - 4.0 ** -ladder[1:])
    price = np.outer(cost[stored], np.diff(ladder))
    # Stable on the flattened [channel, step] order keeps a channel's steps in sequence where slopes tie (s = 0).
    order = np.argsort(-(gain / price), axis=None, kind="stable")
    channels, prices = stored[order // max(len(widths) - 1, 1)], price.ravel()[order]
    budget = target * cost.sum() * (1 + _ROUNDING) - ladder[0] * cost.sum()
    spent = np.cumsum(prices)
    fitting = int(np.searchsorted(spent, budget, side="right"))  # all of these fit, one after the other
    level = np.bincount(channels[:fitting], minlength=len(squared))
    left = budget - (spent[fitting - 1] if fitting else 0.0)
    _fill_up(level, channels[fitting:], prices[fitting:], left)
    return _widths_at(level, widths, sensitivity)


def _fill_up(level: np.ndarray, channels: np.ndarray, prices: np.ndarray, left: float) -> None:
    """Take, in order, those of the remaining steps that still fit; a channel that misses one takes no other."""
    least = prices.min(initial=np.inf)
    if left < least:
        return
    dear = np.flatnonzero(prices > left)[::-1]
    first_missed = np.full(len(level), len(prices))
    first_missed[channels[dear]] = dear  # of several, the last one written is the first in order
    fitting = np.flatnonzero(prices <= left)
    missed = set()
    for step in fitting[first_missed[channels[fitting]] > fitting].tolist():
        if left < least:
            return
        channel = int(channels[step])
        if prices[step] <= left and channel not in missed:
            level[channel] += 1
            left -= prices[step]
        else:
            missed.add(channel)


def allocate_shares(scores: Tensor, widths: Sequence[int], shares: Sequence[float]) -> Tensor:
    """Cut the ranking of the channels at fixed shares of them, whatever mean that gives.

    Args:
        scores: importance, `[in_features]`; equal scores keep the order of their positions.
        widths: allowed widths in bits, ascending.
        shares: fraction of the channels at each width, with the sum 1; the widest go to the most important.

    Returns:
        Bits per channel, uint8 `[in_features]`, on the device of `scores`.
    """
    order = np.argsort(-_to_numpy(scores), kind="stable")
    cuts = np.rint(np.cumsum(np.asarray(shares, dtype=float)[::-1])[:-1] * len(order))
    level = np.zeros(len(order), dtype=int)
    level[order] = len(widths) - 1 - np.searchsorted(cuts, np.arange(len(order)), side="right")
    return _widths_at(level, widths, scores)


def greedy_curve(errors: np.ndarray, counts: np.ndarray, widths: Sequence[int]) -> Callable[[float], float]:
    """Return the least error as a function of the mean bits, when bits are dealt in order of gain.

    Args:
        errors: error of each channel at 0 bits; it falls by four with every bit, `[channels]`.
        counts: stored weights per channel, `[channels]`.
        widths: allowed widths in bits, ascending.

    Returns:
        A function of the mean bits per stored weight, linear between the steps.
    """
    ladder = np.asarray(widths, dtype=float)
    stored = counts > 0
    gain = np.outer(errors[stored], 4.0 ** -ladder[:-1] - 4.0 ** -ladder[1:]).ravel()
    price = np.outer(counts[stored], np.diff(ladder)).ravel()
    order = np.argsort(-gain / price, kind="stable")
    total = max(float(counts.sum()), 1.0)
    means = ladder[0] + np.concatenate([[0.0], np.cumsum(price[order])]) / total
    left = float(errors[stored].sum()) * 4.0 ** -ladder[0] - np.concatenate([[0.0], np.cumsum(gain[order])])
    return lambda mean: float(np.interp(mean, means, left))


def choose_points(bits: Sequence[np.ndarray], losses: Sequence[np.ndarray], budget: float) -> list[int]:
    """Take one point of each curve so that the sum of losses is least and the sum of bits is within the budget.

    Bits are counted in units of `budget / BUDGET_UNITS` (at least 1), rounded up: the budget is never exceeded, and the
    choice is the best one for costs that are whole units.

    Args:
        bits: price of each point, one array per linear.
        losses: loss of each point, same shapes.
        budget: in bits; at least the sum of the cheapest points.

    Returns:
        The index of the point taken, one per linear.
    """
    unit = max(budget / BUDGET_UNITS, 1.0)
    # Counted above the cheapest point of each linear, so that rounding up costs little.
    base = np.array([prices.min() for prices in bits])
    units = int((budget - base.sum()) / unit * (1 + _ROUNDING) + _ROUNDING)
    best = np.zeros(units + 1)
    taken = []
    for prices, costs, least in zip(bits, losses, base, strict=True):
        steps = np.ceil((prices - least) / unit - _ROUNDING).astype(int)
        offers = np.full((len(prices), units + 1), np.inf)
        for row, (step, cost) in enumerate(zip(steps, costs, strict=True)):
            if step <= units:
                offers[row, step:] = best[: units + 1 - step] + cost
        choice = offers.argmin(0)
        best = offers[choice, np.arange(units + 1)]
        taken.append((choice, steps))
    chosen, at = [], units
    for choice, steps in reversed(taken):
        index = int(choice[at])
        chosen.append(index)
        at -= int(steps[index])
    return chosen[::-1]


def _tilted_shares(widths: np.ndarray, target: float) -> np.ndarray:
    """Return shares proportional to exp(t * width) whose mean width is the target."""

    def shares(tilt: float) -> np.ndarray:
        logits = tilt * widths
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    low, high = -1.0, 1.0
    while shares(low) @ widths > target and low > -1e3:
        low *= 2
    while shares(high) @ widths < target and high < 1e3:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if shares(middle) @ widths < target else (low, middle)
    return shares((low + high) / 2)


def _settle(level: np.ndarray, order: np.ndarray, cost: np.ndarray, widths: np.ndarray, target: float) -> None:
    """Move the cuts, one channel at a time, until the budget is met and no further channel fits. Works in place.

    Only channels next to a cut move, so a higher score never ends with a narrower width.
    """
    budget = target * cost.sum() * (1 + _ROUNDING)
    spent = float((cost * widths[level]).sum())

    def step_down(channel: int) -> float:
        return float((widths[level[channel]] - widths[level[channel] - 1]) * cost[channel])

    def step_up(channel: int) -> float:
        return float((widths[level[channel] + 1] - widths[level[channel]]) * cost[channel])

    while spent > budget:
        ranked = level[order]
        channel = min((order[ranked == rung][-1] for rung in range(1, len(widths)) if rung in ranked), key=step_down)
        spent -= step_down(channel)
        level[channel] -= 1
    while True:
        ranked = level[order]
        first = (order[ranked == rung][0] for rung in range(len(widths) - 1) if rung in ranked)
        fitting = [channel for channel in first if spent + step_up(channel) <= budget]
        if not fitting:
            return
        channel = max(fitting, key=step_up)
        spent += step_up(channel)
        level[channel] += 1


def _to_numpy(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()


def _widths_at(level: np.ndarray, widths: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(np.asarray(widths)[level], dtype=torch.uint8, device=like.device)
