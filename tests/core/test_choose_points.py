"""Points of many linears within one budget, against exhaustive search; the curve of one linear against its widths."""

import heapq
import itertools

import numpy as np
import pytest
import torch

from sgpt_lightning.core.allocation import BUDGET_UNITS, allocate_budget, choose_points, greedy_curve


def curves(seed: int, unit: int = 1) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Three to five linears with three to five points each, in any order; prices are multiples of `unit`."""
    rng = np.random.default_rng(seed)
    sizes = [int(rng.integers(3, 6)) for _ in range(rng.integers(3, 6))]
    return [rng.integers(1, 60, size) * unit for size in sizes], [rng.exponential(1.0, size) for size in sizes]


def totals(bits: list[np.ndarray], losses: list[np.ndarray]) -> list[tuple[float, float]]:
    """Price and loss of every combination."""
    return [
        tuple(sum(values[i] for values, i in zip(parts, choice, strict=True)) for parts in (bits, losses))
        for choice in itertools.product(*(range(len(prices)) for prices in bits))
    ]


def taken(bits: list[np.ndarray], losses: list[np.ndarray], budget: float) -> tuple[float, float]:
    chosen = choose_points(bits, losses, budget)
    assert len(chosen) == len(bits)
    assert all(type(index) is int and 0 <= index < len(prices) for index, prices in zip(chosen, bits, strict=True))
    return tuple(sum(values[i] for values, i in zip(parts, chosen, strict=True)) for parts in (bits, losses))


def budgets(bits: list[np.ndarray], count: int = 12) -> np.ndarray:
    """From the sum of the cheapest points to above that of the dearest."""
    low, high = (sum(float(pick(prices)) for prices in bits) for pick in (np.min, np.max))
    return np.unique(np.ceil(np.linspace(low, high * 1.1, count)))


@pytest.mark.parametrize("seed", range(25))
def test_the_choice_equals_exhaustive_search_and_stays_within_the_budget(seed):
    bits, losses = curves(seed)
    everything = totals(bits, losses)
    for budget in budgets(bits):
        price, loss = taken(bits, losses, budget)
        assert price <= budget
        assert loss == pytest.approx(min(cost for spent, cost in everything if spent <= budget), rel=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_prices_in_whole_units_of_a_large_budget_are_exact_too(seed):
    unit = 1000
    bits, losses = curves(seed, unit)
    # A dear linear of one point makes the budget the one whose unit is 1000 bits.
    for budget in budgets(bits, 6):
        rest = BUDGET_UNITS * unit - budget
        price, loss = taken([*bits, np.array([rest])], [*losses, np.array([0.0])], BUDGET_UNITS * unit)
        assert price - rest <= budget
        everything = totals(bits, losses)
        assert loss == pytest.approx(min(cost for spent, cost in everything if spent <= budget), rel=1e-12)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("scale", [1e5, 3e9])
def test_large_budgets_are_kept_and_lose_no_more_than_a_unit_for_each_linear(seed, scale):
    rng = np.random.default_rng(seed)
    bits, losses = curves(seed)
    bits = [(prices + rng.random(len(prices))) * scale for prices in bits]
    everything = totals(bits, losses)
    for budget in budgets(bits):
        price, loss = taken(bits, losses, budget)
        assert price <= budget * (1 + 1e-8)  # float64 sums, and 1e-9 for them in the code
        # Each price is rounded up by less than a unit: whatever fits into that much less is found.
        tighter = budget - (len(bits) + 1) * budget / BUDGET_UNITS
        fits = [cost for spent, cost in everything if spent <= tighter]
        assert loss <= min(fits, default=np.inf) * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_a_larger_budget_never_gives_a_larger_loss(seed):
    bits, losses = curves(seed)
    found = [taken(bits, losses, budget)[1] for budget in range(int(budgets(bits)[0]), int(budgets(bits)[-1]) + 1)]
    assert (np.diff(found) <= 1e-12).all()
    assert found[-1] == pytest.approx(sum(costs.min() for costs in losses))
    assert found[0] > found[-1]


def test_the_cheapest_points_are_taken_where_nothing_else_fits_even_if_their_sum_is_no_whole_unit():
    bits, losses = [np.array([1e9 / 3, 1e9]), np.array([2e9, 1e9 / 7])], [np.array([1.0, 0.0]), np.array([0.0, 1.0])]
    assert choose_points(bits, losses, 1e9 / 3 + 1e9 / 7) == [0, 1]


def test_where_a_dearer_point_is_no_better_the_cheaper_one_pays_for_others():
    bits = [np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0])]
    losses = [np.array([5.0, 1.0, 4.0]), np.array([9.0, 2.0])]
    assert choose_points(bits, losses, 5.0) == [1, 1]


# ----- the curve of one linear -----


def channels(seed: int, widths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 12, 15).astype(float)
    counts[:2] = 0, 7
    return np.exp(2 * rng.standard_normal(15)), counts


def steps(errors: np.ndarray, counts: np.ndarray, widths: tuple[int, ...]) -> list[float]:
    """The means at which one more channel has been raised, by a heap of the next step of each channel."""

    def offer(channel: int, rung: int) -> tuple[float, int, int]:
        gain = errors[channel] * (4.0 ** -widths[rung] - 4.0 ** -widths[rung + 1])
        return -gain / (counts[channel] * (widths[rung + 1] - widths[rung])), channel, rung

    heap = [offer(channel, 0) for channel in np.nonzero(counts)[0]]
    heapq.heapify(heap)
    spent, means = float(widths[0] * counts.sum()), [float(widths[0])]
    while heap:
        _, channel, rung = heapq.heappop(heap)
        spent += counts[channel] * (widths[rung + 1] - widths[rung])
        means.append(spent / counts.sum())
        if rung + 2 < len(widths):
            heapq.heappush(heap, offer(channel, rung + 1))
    return means


def error_of(errors: np.ndarray, counts: np.ndarray, widths: tuple[int, ...], mean: float) -> float:
    """What the channels that are stored err with the widths that they are dealt at that mean."""
    sensitivity, stored = torch.from_numpy(np.sqrt(errors)), counts > 0
    dealt = allocate_budget(sensitivity, widths, mean, torch.from_numpy(counts)).double().numpy()
    return float((errors * 4.0**-dealt)[stored].sum())


@pytest.mark.parametrize("widths", [(2, 3, 4), (2, 3, 4, 6, 8), (1, 8), (4, 5)], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_at_each_step_the_curve_is_the_error_of_the_widths_dealt_at_that_mean(seed, widths):
    errors, counts = channels(seed, widths)
    curve, means = greedy_curve(errors, counts, widths), steps(errors, counts, widths)
    assert means[-1] == pytest.approx(widths[-1])
    for mean in means:
        assert curve(mean) == pytest.approx(error_of(errors, counts, widths, mean), rel=1e-9)
    for before, after in itertools.pairwise(means):
        middle = (curve(before) + curve(after)) / 2
        assert curve((before + after) / 2) == pytest.approx(middle, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_curve_falls_and_is_convex_and_is_flat_outside_the_ladder(seed):
    widths = (2, 3, 4, 6, 8)
    errors, counts = channels(seed, widths)
    curve = greedy_curve(errors, counts, widths)
    values = np.array([curve(mean) for mean in np.linspace(2, 8, 400)])
    assert (np.diff(values) < 0).all()
    assert (np.diff(values, 2) > -1e-12 * values[0]).all()
    assert curve(1.0) == curve(2.0)
    assert curve(9.0) == curve(8.0)


def test_a_linear_without_stored_weights_has_no_error():
    curve = greedy_curve(np.ones(3), np.zeros(3), (2, 4))
    assert curve(2.0) == curve(3.0) == curve(4.0) == 0
