"""Bit widths against exhaustive search, and the promises about budgets on random cases."""

import itertools

import numpy as np
import pytest
import torch
from oracles import generator

from sgpt_lightning.core.allocation import allocate_budget, allocate_quantile

BOTH = pytest.mark.parametrize("allocate", [allocate_quantile, allocate_budget])
LADDERS = pytest.mark.parametrize("widths", [(1,), (4,), (2, 8), (2, 3, 4), (2, 3, 4, 6, 8), tuple(range(1, 9))])


def case(channels: int, seed: int, widths: tuple[int, ...], rows: int = 64) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Heavy-tailed scores, survivors per channel of a mask that spares some channels and empties others; a target."""
    g = generator(seed)
    scores = torch.randn(channels, generator=g).mul(1.5).exp().double()
    share = torch.rand(channels, generator=g)
    counts = torch.bernoulli(share[:, None].expand(channels, rows), generator=g).sum(1)
    counts[torch.rand(channels, generator=g) < 0.05] = 0
    target = widths[0] + float(torch.rand((), generator=g)) * (widths[-1] - widths[0])
    return scores, counts, target


def spent(bits: torch.Tensor, counts: torch.Tensor) -> float:
    return float((bits.double() * counts.double()).sum())


def predicted_error(scores: torch.Tensor, bits: torch.Tensor, counts: torch.Tensor) -> float:
    stored = counts > 0
    return float((scores[stored].square() * 4.0 ** -bits[stored].double()).sum())


@BOTH
@LADDERS
@pytest.mark.parametrize("seed", range(6))
def test_the_budget_is_never_exceeded_and_99_percent_of_it_is_used(allocate, widths, seed):
    scores, counts, target = case(300, seed, widths)
    bits = allocate(scores, widths, target, counts)
    budget = target * float(counts.sum())
    assert bits.dtype == torch.uint8
    assert set(bits.tolist()) <= set(widths)
    assert 0.99 * budget <= spent(bits, counts) <= budget * (1 + 1e-9)  # 1e-9: float64 sums of thousands


@BOTH
@LADDERS
def test_both_ends_of_the_ladder_are_met_exactly(allocate, widths):
    scores, counts, _ = case(50, 0, widths)
    for end in (widths[0], widths[-1]):
        bits = allocate(scores, widths, float(end), counts)
        assert set(bits[counts > 0].tolist()) == {end}


@BOTH
@pytest.mark.parametrize("target", [2.1, 3.0, 4.0, 4.6, 5.5, 7.9])
@pytest.mark.parametrize("channels", [1, 2, 7, 64])
def test_the_mean_stops_where_no_channel_could_be_raised_any_more(allocate, target, channels):
    widths = (2, 3, 4, 6, 8)
    step = {2: 1, 3: 1, 4: 2, 6: 2, 8: float("inf")}
    scores, counts, _ = case(channels, channels, widths)
    counts = torch.full_like(counts, 10)
    bits = allocate(scores, widths, target, counts)
    left = target * 10 * channels - spent(bits, counts)
    assert -1e-6 <= left < 10 * min(step[width] for width in bits.tolist())


@BOTH
@pytest.mark.parametrize("seed", range(6))
def test_equal_counts_give_a_higher_score_no_fewer_bits(allocate, seed):
    widths = (2, 3, 4, 6, 8)
    scores, counts, target = case(120, seed, widths)
    bits = allocate(scores, widths, target, torch.full_like(counts, 16))
    assert (bits[scores.argsort()].short().diff() >= 0).all()


@LADDERS
@pytest.mark.parametrize("seed", range(6))
def test_quantile_gives_a_higher_score_no_fewer_bits_whatever_the_counts(widths, seed):
    scores, counts, target = case(120, seed, widths)
    bits = allocate_quantile(scores, widths, target, counts).short()
    stored = counts > 0
    assert (bits[stored][scores[stored].argsort()].diff() >= 0).all()
    assert (bits[~stored] == widths[0]).all()


def test_quantile_uses_every_width_in_nearly_equal_shares_where_the_target_is_the_mean_of_the_ladder():
    widths = (2, 3, 4, 6, 8)
    bits = allocate_quantile(torch.rand(1000, generator=generator()), widths, 4.6, torch.ones(1000))
    shares = [int((bits == width).sum()) for width in widths]
    assert sum(shares) == 1000
    assert max(shares) - min(shares) <= 4  # a cut falls between channels, and up to a step is given or taken


def test_quantile_breaks_ties_by_position():
    bits = allocate_quantile(torch.ones(10), (2, 4), 3.0, torch.ones(10))
    assert bits.tolist() == [4] * 5 + [2] * 5


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("widths", [(1, 2), (2, 3, 4), (1, 2, 3, 4)])
def test_budget_equals_exhaustive_search_for_unit_steps_and_equal_counts(widths, seed):
    scores, _, target = case(5, seed, widths)
    counts = torch.full((5,), 3)
    best = min(
        sum(s * s * 4.0**-b for s, b in zip(scores.tolist(), choice, strict=True))
        for choice in itertools.product(widths, repeat=5)
        if sum(choice) * 3 <= target * 15 + 1e-9
    )
    bits = allocate_budget(scores, widths, target, counts)
    assert predicted_error(scores, bits, counts) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_budget_is_at_most_one_step_from_exhaustive_search_for_any_counts(seed):
    widths = (2, 3, 4, 8)
    scores, _, target = case(5, seed, widths)
    counts = torch.randint(1, 20, (5,), generator=generator(seed))
    errors = {
        choice: predicted_error(scores, torch.tensor(choice), counts)
        for choice in itertools.product(widths, repeat=5)
        if spent(torch.tensor(choice), counts) <= target * float(counts.sum()) + 1e-9
    }
    # Greedy loses at most the largest gain of a single step against the best division (knapsack bound).
    largest_step = max(float(s) ** 2 * (4.0**-a - 4.0**-b) for s in scores for a, b in itertools.pairwise(widths))
    error = predicted_error(scores, allocate_budget(scores, widths, target, counts), counts)
    assert min(errors.values()) <= error * (1 + 1e-12)
    assert error <= min(errors.values()) + largest_step


@pytest.mark.parametrize("seed", range(4))
def test_a_larger_budget_never_gives_a_larger_error(seed):
    widths = (2, 3, 4, 6, 8)
    scores, counts, _ = case(60, seed, widths)
    results = [allocate_budget(scores, widths, t, counts) for t in np.linspace(2, 8, 61)]
    assert (np.diff([predicted_error(scores, bits, counts) for bits in results]) <= 0).all()
    assert (np.diff([spent(bits, counts) for bits in results]) >= 0).all()


def test_budget_predicts_less_error_than_quantile_and_than_one_width():
    widths = (2, 3, 4, 6, 8)
    for seed in range(5):
        scores, counts, _ = case(200, seed, widths)
        error = predicted_error(scores, allocate_budget(scores, widths, 4.0, counts), counts)
        assert error < predicted_error(scores, allocate_quantile(scores, widths, 4.0, counts), counts)
        assert error < predicted_error(scores, torch.full((200,), 4), counts)


def test_a_channel_is_paid_for_by_its_survivors_and_not_by_its_size():
    # Twice the survivors for the same score: the cheap channels are raised first.
    counts = torch.tensor([20, 10] * 10)
    bits = allocate_budget(torch.ones(20), (2, 4), 2 + 2 / 3, counts)
    assert bits.tolist() == [2, 4] * 10
    assert spent(bits, counts) == (2 + 2 / 3) * 300


@BOTH
def test_channels_without_survivors_cost_nothing_and_get_the_narrowest_width(allocate):
    counts = torch.tensor([0, 8, 0, 8, 8, 8])
    scores = torch.tensor([9.0, 1.0, 9.0, 2.0, 3.0, 4.0])
    bits = allocate(scores, (2, 4), 3.0, counts)
    assert bits.tolist() == [2, 2, 2, 2, 4, 4]
    assert allocate(scores, (2, 4), 3.0, torch.zeros(6)).tolist() == [2] * 6


@BOTH
def test_scores_that_are_all_zero_still_spend_the_budget(allocate):
    bits = allocate(torch.zeros(100), (2, 3, 4, 6, 8), 3.0, torch.ones(100))
    assert 0.99 * 300 <= int(bits.sum()) <= 300


def plain_greedy(scores, widths, target, counts):
    """Step by step in order of gain per bit; a step that does not fit is passed over."""
    steps = sorted(
        (-(score**2) * (4.0**-low - 4.0**-high) / (count * (high - low)), channel, low, high)
        for channel, (score, count) in enumerate(zip(scores, counts, strict=True))
        for low, high in itertools.pairwise(widths)
        if count
    )
    bits, left = [widths[0]] * len(scores), target * sum(counts) * (1 + 1e-9) - widths[0] * sum(counts)
    for _, channel, low, high in steps:
        if bits[channel] == low and counts[channel] * (high - low) <= left:
            bits[channel] = high
            left -= counts[channel] * (high - low)
    return bits


@pytest.mark.parametrize("widths", [(2, 3, 4, 6, 8), (1, 2, 8), (2, 4), (3,)])
@pytest.mark.parametrize("seed", range(20))
def test_budget_takes_the_steps_that_a_plain_loop_takes(widths, seed):
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(40, generator=g, dtype=torch.float64) ** 4
    scores[::7] = 0
    counts = torch.randint(0, 9, (40,), generator=g) if seed % 2 else torch.full((40,), 17)
    target = widths[0] + (widths[-1] - widths[0]) * float(torch.rand(1, generator=g))
    expected = plain_greedy(scores.tolist(), widths, target, counts.tolist())
    assert allocate_budget(scores, widths, target, counts).tolist() == expected
