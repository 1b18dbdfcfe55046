"""The five scores against numpy, and the Hessian score against removing each channel for real."""

import numpy as np
import pytest
import torch
from oracles import correlated_inputs, damped, random_weight

from sgpt_lightning.core.hessian import inverse_factor
from sgpt_lightning.core.importance import channel_importance, channel_scores
from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.presets import ImportanceWeights

ROWS, FEATURES = 10, 16
NAMES = ["activation", "hessian", "weight", "output", "stability"]


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor, InputStatistics]:
    inputs = correlated_inputs(400, FEATURES) + torch.linspace(-1, 1, FEATURES)
    statistics = InputStatistics(FEATURES)
    statistics.add(inputs)
    return random_weight(ROWS, FEATURES), inputs, statistics


def error_of_removing(channel: int, weight: np.ndarray, hessian: np.ndarray) -> float:
    """Least squared output error of a matrix without `channel`, all other weights free (dense solve)."""
    rest = [j for j in range(len(hessian)) if j != channel]
    solution = np.zeros_like(weight)
    solution[:, rest] = np.linalg.solve(hessian[np.ix_(rest, rest)], hessian[rest] @ weight.T).T
    difference = weight - solution
    return float(np.trace(difference @ hessian @ difference.T))


def oracle_scores(weight: torch.Tensor, inputs: torch.Tensor, inverse_diagonal: torch.Tensor) -> dict[str, np.ndarray]:
    w, x = weight.double().numpy(), inputs.double().numpy()
    size = np.abs(x).mean(0)
    scores = {
        "activation": size,
        "hessian": 1 / inverse_diagonal.double().numpy(),
        "weight": np.abs(w).sum(0) / len(w),
        "output": np.sqrt(((w * size) ** 2).sum(0) / len(w)),
        "stability": x.std(0) ** 2,
    }
    return {name: score / score.mean() for name, score in scores.items()}


def test_the_five_scores_are_those_of_numpy_with_mean_one(layer):
    weight, inputs, statistics = layer
    inverse_diagonal = inverse_factor(statistics.second_moment).inverse_diagonal
    scores = channel_scores(weight, statistics, inverse_diagonal)
    expected = oracle_scores(weight, inputs, inverse_diagonal)
    assert list(scores) == NAMES
    for name in NAMES:
        assert scores[name].dtype == torch.float64
        assert scores[name].mean().item() == pytest.approx(1, rel=1e-12)
        np.testing.assert_allclose(scores[name], expected[name], rtol=1e-6)  # squares of inputs are float32


@pytest.mark.parametrize("name", NAMES)
def test_importance_with_all_weight_on_one_score_is_that_score(layer, name):
    weight, _, statistics = layer
    inverse_diagonal = inverse_factor(statistics.second_moment).inverse_diagonal
    only = ImportanceWeights(**{other: float(other == name) for other in NAMES})
    importance = channel_importance(weight, statistics, inverse_diagonal, only)
    assert torch.equal(importance, channel_scores(weight, statistics, inverse_diagonal)[name])


def test_importance_is_the_weighted_sum_of_the_scores(layer):
    weight, inputs, statistics = layer
    inverse_diagonal = inverse_factor(statistics.second_moment).inverse_diagonal
    shares = {"activation": 0.1, "hessian": 0.2, "weight": 0.3, "output": 0.15, "stability": 0.25}
    expected = sum(shares[name] * score for name, score in oracle_scores(weight, inputs, inverse_diagonal).items())
    importance = channel_importance(weight, statistics, inverse_diagonal, ImportanceWeights(**shares))
    np.testing.assert_allclose(importance, expected, rtol=1e-6)  # as above


def test_the_hessian_score_is_the_error_of_removing_the_channel(layer):
    _, _, statistics = layer
    hessian = damped(statistics.second_moment).numpy()
    unit = np.ones((1, FEATURES))
    errors = np.array([error_of_removing(j, unit, hessian) for j in range(FEATURES)])
    inverse_diagonal = inverse_factor(statistics.second_moment).inverse_diagonal
    score = channel_scores(random_weight(ROWS, FEATURES), statistics, inverse_diagonal)["hessian"].numpy()
    np.testing.assert_allclose(score, errors / errors.mean(), rtol=1e-4)  # the factor is float32
    assert errors.max() > 1.5 * errors.min()  # far from equal: the reciprocal would have been told apart


def test_scores_of_inputs_that_never_fired_are_zero_and_not_nan():
    statistics = InputStatistics(FEATURES)
    statistics.add(torch.zeros(8, FEATURES))
    inverse_diagonal = inverse_factor(statistics.second_moment).inverse_diagonal
    scores = channel_scores(random_weight(ROWS, FEATURES), statistics, inverse_diagonal)
    for name in ("activation", "output", "stability"):
        assert torch.equal(scores[name], torch.zeros(FEATURES, dtype=torch.float64))
    assert torch.isfinite(torch.stack(list(scores.values()))).all()


def test_a_channel_that_is_scaled_up_becomes_more_important_by_every_input_score():
    inputs = correlated_inputs(300, FEATURES)
    louder = inputs.clone()
    louder[:, 5] *= 10
    weight, scores = random_weight(ROWS, FEATURES), []
    for x in (inputs, louder):
        statistics = InputStatistics(FEATURES)
        statistics.add(x)
        inverse_diagonal = inverse_factor(statistics.second_moment).inverse_diagonal
        scores.append(channel_scores(weight, statistics, inverse_diagonal))
    for name in ("activation", "hessian", "output", "stability"):
        assert scores[1][name][5] > 2 * scores[0][name][5]
    assert torch.equal(scores[0]["weight"], scores[1]["weight"])
