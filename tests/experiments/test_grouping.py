"""Groups by mutual information, against loops, integrals and planted blocks."""

import itertools
import math

import numpy as np
import pytest
import torch

from sgpt_lightning.core.allocation import allocate_budget
from sgpt_lightning.experiments.grouping import (
    allocate_groups,
    dissimilarity,
    group_channels,
    inside_and_between,
    k_means,
    pair_information,
    silhouette,
)

SIZES = (24, 16, 12, 28)


def normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def planted(sizes=SIZES, tokens=600, noise=1.0, seed=0):
    """Channels that have what drives them in common with those of their block alone, and the blocks."""
    blocks = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    inputs = normal(tokens, len(sizes), seed=seed)[:, blocks] + noise * normal(tokens, len(blocks), seed=seed + 1)
    return inputs, blocks


def rand_index(first, second):
    """The adjusted Rand index (Hubert and Arabie 1985) from its definition: pairs that two groupings agree on."""
    pairs = list(itertools.combinations(range(len(first)), 2))
    together = [[bool(labels[i] == labels[j]) for i, j in pairs] for labels in (first, second)]
    both = sum(a and b for a, b in zip(*together, strict=True))
    one, other = map(sum, together)
    expected, most = one * other / len(pairs), (one + other) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def shuffled(count, seed=7):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def test_the_oracle_tells_groupings_apart():
    assert rand_index([0, 0, 1, 1], [5, 5, 2, 2]) == 1
    crossed = rand_index([0, 0, 1, 1], [0, 1, 0, 1])
    assert crossed == pytest.approx(-0.5)  # of 6 pairs 2 in each, none in both: (0 - 2/3) / (2 - 2/3)


@pytest.mark.parametrize("rho", [0.0, 0.3, -0.6, 0.9])
def test_two_normal_channels_have_the_information_of_their_densities(collect, rho):
    samples = torch.linalg.qr(normal(8192, 3).double() - normal(8192, 3).double().mean(0))[0]
    samples = (samples - samples.mean(0))[:, :2]
    first, second = torch.linalg.qr(samples)[0].T * math.sqrt(8192)  # uncorrelated to the last digit, of variance 1
    pair = torch.stack([first, rho * first + math.sqrt(1 - rho**2) * second], 1)
    found = pair_information(collect(pair.float()))
    x, y = np.meshgrid(*2 * [np.linspace(-8, 8, 801)])
    joint = np.exp(-(x**2 - 2 * rho * x * y + y**2) / (2 * (1 - rho**2))) / (2 * np.pi * math.sqrt(1 - rho**2))
    apart = np.exp(-(x**2 + y**2) / 2) / (2 * np.pi)
    terms = np.where(joint > 0, joint * np.log(np.maximum(joint, 1e-300) / np.maximum(apart, 1e-300)), 0)
    integral = terms.sum() * 0.02**2
    assert abs(float(found[0, 1]) - integral) < 1e-3
    assert float(dissimilarity(found)[0, 1]) == pytest.approx(math.sqrt(1 - rho**2), abs=1e-3)
    assert found[0, 0] == found[1, 1] == 0
    assert found[0, 1] == found[1, 0]


def test_what_tokens_overestimate_is_taken_off_and_a_constant_tells_nothing(collect):
    inputs = normal(50, 6) + normal(50, 1)
    inputs[:, 2] = 3.0
    squared = np.corrcoef(np.delete(inputs.double().numpy(), 2, 1).T) ** 2
    shrunk = np.maximum((squared - 1 / 50) / (1 - 1 / 50), 0)
    np.fill_diagonal(shrunk, 0)
    found = pair_information(collect(inputs))
    rest = [0, 1, 3, 4, 5]
    assert torch.allclose(found[rest][:, rest], torch.tensor(-0.5 * np.log(1 - shrunk)), atol=1e-5)  # float32 moments
    assert bool((found[2] == 0).all())
    same = normal(50, 1).repeat(1, 2)
    assert pair_information(collect(same))[0, 1] == pytest.approx(10 * math.log(2))  # the cap, 1 - 2^-20
    with pytest.raises(ValueError, match="two tokens at least, got 1"):
        pair_information(collect(inputs[:1]))


@pytest.mark.parametrize("count", [len(SIZES), "auto"])
def test_planted_blocks_are_found(collect, count):
    inputs, blocks = planted()
    order = shuffled(len(blocks))
    labels = group_channels(collect(inputs[:, order]), count)
    assert rand_index(labels.tolist(), blocks[order].tolist()) == 1
    firsts = [labels.tolist().index(group) for group in range(len(SIZES))]
    assert firsts == sorted(firsts)  # numbered in the order of their first channels


def test_order_sign_and_positive_scale_of_channels_do_not_matter(collect):
    inputs = normal(400, 12) @ normal(12, 72, seed=1) + normal(400, 72, seed=2)  # no clear blocks
    labels = group_channels(collect(inputs), 4)
    assert len(labels.unique()) > 2
    order, signs = shuffled(72), torch.where(normal(72, seed=3) > 0, 1.0, -1.0)
    changed = (inputs * signs * normal(72, seed=4).exp())[:, order]
    assert rand_index(group_channels(collect(changed), 4).tolist(), labels[order].tolist()) == 1


def test_small_groups_join_the_one_that_they_tell_most_about(collect):
    inputs, blocks = planted((40, 40, 6))
    inputs[:, 80:] += 0.3 * inputs[:, 40:46]
    labels = group_channels(collect(inputs), 3)  # 8 channels at least
    assert rand_index(labels.tolist(), blocks.clamp_max(1).tolist()) == 1


def test_channels_that_do_not_vary_are_a_group_of_their_own_or_go_along(collect):
    inputs, blocks = planted((20, 20))
    inputs = torch.cat([inputs, torch.ones(len(inputs), 9)], 1)
    apart = group_channels(collect(inputs), 2)
    assert apart.tolist() == [*blocks.tolist(), *[2] * 9]
    along = group_channels(collect(inputs), 2, dead_apart=False).tolist()
    assert along[:40] == blocks.tolist()
    assert along[40:] in ([0] * 9, [1] * 9)
    assert group_channels(collect(torch.ones(10, 9)), 4).tolist() == [0] * 9


def test_one_group_is_one_group_and_none_is_refused(collect):
    inputs, _ = planted()
    assert group_channels(collect(inputs), 1).tolist() == [0] * sum(SIZES)
    with pytest.raises(ValueError, match="count must be at least 1 or auto, got 0"):
        group_channels(collect(inputs), 0)


def test_groups_are_the_same_whatever_the_global_generator_says_which_is_left_alone(collect):
    statistics = collect(planted(noise=4.0)[0])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = group_channels(statistics, 5)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        assert torch.equal(group_channels(statistics, 5), first)


def test_k_means_is_no_worse_than_any_division_into_two():
    points = normal(9, 2).double()
    labels = k_means(points, 2)

    def inertia(chosen):
        parts = (points[chosen], points[~chosen])
        return sum(float((part - part.mean(0)).square().sum()) for part in parts)

    divisions = [torch.tensor(bits) for bits in itertools.product((False, True), repeat=9) if 0 < sum(bits) < 9]
    assert inertia(labels == 0) == pytest.approx(min(map(inertia, divisions)))
    assert len(k_means(torch.ones(5, 3).double(), 4).unique()) == 1


def test_the_silhouette_is_that_of_a_loop_over_points():
    points = normal(20, 2)
    labels = torch.tensor([0] * 7 + [3] * 6 + [4] * 6 + [9])
    distances = torch.cdist(points, points).double()
    values = []
    for i, own in enumerate(labels):
        others = [j for j in range(20) if j != i and labels[j] == own]
        if not others:
            values.append(0.0)
            continue
        a = sum(float(distances[i, j]) for j in others) / len(others)
        b = min(float(distances[i, labels == other].mean()) for other in (0, 3, 4, 9) if other != own)
        values.append((b - a) / max(a, b))
    assert silhouette(distances, labels) == pytest.approx(sum(values) / 20)
    assert silhouette(distances, torch.zeros(20, dtype=torch.int64)) == 0


def test_information_inside_and_between_groups_is_the_mean_over_pairs():
    information = torch.tensor([[0.0, 3, 1, 5], [3, 0, 2, 4], [1, 2, 0, 6], [5, 4, 6, 0]])
    inside, between = inside_and_between(information, torch.tensor([0, 0, 1, 1]))
    assert (inside, between) == (4.5, 3.0)
    assert math.isnan(inside_and_between(information, torch.zeros(4))[1])


GROUPS = torch.tensor([0] * 5 + [1] * 3 + [2] * 8)
COUNTS = torch.tensor([4, 0, 2, 3, 3, 4, 4, 4, *[2] * 8])


def objective(scores, bits, counts=COUNTS):
    return float((scores.double().square() * 4.0 ** -bits.double())[counts > 0].sum())


@pytest.mark.parametrize("target", [2.2, 3.0, 4.1, 5.5])
def test_widths_of_groups_are_the_best_of_all_within_the_budget(target):
    widths, scores = (2, 3, 5), normal(16).exp() * (COUNTS > 0)
    target = min(target, 5)
    bits = allocate_groups(scores, widths, target, COUNTS, groups=GROUPS)
    assert bits.dtype == torch.uint8
    budget = target * int(COUNTS.sum())
    tried = (torch.tensor(chosen)[GROUPS] for chosen in itertools.product(widths, repeat=3))
    best = min(objective(scores, each) for each in tried if int((each * COUNTS).sum()) <= budget + 1e-6)
    assert objective(scores, bits) <= best * (1 + 1e-12)
    assert int((bits * COUNTS).sum()) <= budget + 1e-6
    assert sum(len(bits[group == GROUPS].unique()) > 1 for group in range(3)) <= 1


def test_what_is_left_of_the_budget_goes_to_the_most_sensitive_channels_of_one_group():
    groups, counts = torch.arange(1024) // 128, torch.full((1024,), 256)
    scores = (0.05 * normal(1024)).exp()
    bits = allocate_groups(scores, (2, 3, 4, 6, 8), 3.3, counts, groups=groups)
    assert 0.99 * 3.3 <= float(bits.double().mean()) <= 3.3
    split = [group for group in range(8) if len(bits[groups == group].unique()) > 1]
    assert len(split) == 1
    inside, ranked = bits[groups == split[0]].long(), scores[groups == split[0]]
    assert ranked[inside == inside.max()].min() >= ranked[inside == inside.min()].max()


def test_one_group_takes_the_width_asked_for_and_groups_of_one_are_no_worse_than_channels():
    scores, counts = normal(64).exp(), torch.full((64,), 10)
    one = allocate_groups(scores, (2, 3, 4, 6), 4, counts, groups=torch.zeros(64, dtype=torch.int64))
    assert one.tolist() == [4] * 64
    every = allocate_groups(scores, (2, 3, 4, 6), 3.7, counts, groups=torch.arange(64))
    greedy = allocate_budget(scores, (2, 3, 4, 6), 3.7, counts)
    assert objective(scores, every, counts) <= objective(scores, greedy, counts)
    assert float(every.double().mean()) <= 3.7
