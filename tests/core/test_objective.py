"""The objective against the tokens themselves: mean squared output errors and damped regressions in float64."""

import pytest
import torch
from oracles import correlated_inputs, generator, random_weight
from torch import Tensor

from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.core.objective import Objective, make_objective
from sgpt_lightning.presets import Parts

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, FEATURES, TOKENS, DAMP = 6, 16, 300, 0.01


def tokens(seed: int = 0) -> Tensor:
    """Inputs with a mean of their own, as large as their spread."""
    return correlated_inputs(TOKENS, FEATURES, seed) + torch.randn(FEATURES, generator=generator(seed + 50))


def drifted(x: Tensor, seed: int = 0) -> Tensor:
    """What the dense model would have had in place of x: near it, mixed, noisy, with another mean."""
    g = generator(seed + 77)
    mixing = torch.eye(FEATURES) + 0.2 * torch.randn(FEATURES, FEATURES, generator=g)
    return x @ mixing + 0.1 * torch.randn(x.shape, generator=g) + 0.3


def some_gap(x: Tensor, seed: int = 0) -> Tensor:
    g = generator(seed + 99)
    return 0.02 * x @ torch.randn(FEATURES, ROWS, generator=g) + 0.1 * torch.randn(len(x), ROWS, generator=g) + 0.2


def built(weight: Tensor, *inputs: Tensor, has_bias: bool = True, **parts) -> Objective:
    statistics = InputStatistics(weight.shape[1])
    for rows in zip(*(part.split(101) for part in inputs), strict=True):
        statistics.add(*rows)
    return make_objective(weight, statistics, Parts(**parts), has_bias=has_bias, damp_percent=DAMP, name="fc")


def quadratic(q: Tensor, objective: Objective) -> float:
    difference = q.double() - objective.target.double()
    return float((difference @ objective.input.hessian.double() * difference).sum())


def squared_error(wanted: Tensor, q: Tensor, bias: Tensor | float, x: Tensor) -> float:
    """E|wanted - Q x - bias|^2 over the tokens."""
    return float((wanted.double() - x.double() @ q.double().T - bias).square().sum(1).mean())


def damped_cost(wanted: Tensor, q: Tensor, weight: Tensor, x: Tensor, centre: bool) -> float:
    """E|wanted - Q x - b|^2 + d |Q - W|^2, with the best b if `centre`, else none; d a share of the mean variance."""
    x, wanted = x.double(), wanted.double()
    if centre:
        x, wanted = x - x.mean(0), wanted - wanted.mean(0)
    d = DAMP * x.square().mean(0).mean()
    return squared_error(wanted, q, 0.0, x) + float(d * (q.double() - weight.double()).square().sum())


def regression(wanted: Tensor, weight: Tensor, x: Tensor, centre: bool) -> Tensor:
    """The Q of least `damped_cost`, from one least squares problem: tokens, and a row per weight that pulls to W."""
    x, wanted = x.double(), wanted.double()
    if centre:
        x, wanted = x - x.mean(0), wanted - wanted.mean(0)
    d = DAMP * x.square().mean(0).mean()
    pull = d.sqrt() * torch.eye(FEATURES, dtype=torch.float64)
    left = torch.cat([x / TOKENS**0.5, pull])
    return torch.linalg.lstsq(left, torch.cat([wanted / TOKENS**0.5, pull @ weight.double().T])).solution.T


def dense_outputs(weight: Tensor, dense: Tensor) -> Tensor:
    return dense.double() @ weight.double().T


def close(value: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    """1e-4: float32 moments and a float32 inverse of a matrix with a condition number of about 1e3."""
    return float((value.double() - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("noise", [1e-3, 0.02, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_centred_objective_is_the_output_error_once_the_bias_has_moved(noise, seed):
    weight, x = random_weight(ROWS, FEATURES, seed), tokens(seed)
    objective = built(weight, x, alpha=0.0)
    q = weight + noise * torch.randn(ROWS, FEATURES, generator=generator(seed))
    bias = torch.randn(ROWS, generator=generator(seed + 1))
    moved = bias + objective.bias_shift(q)
    expected = squared_error(dense_outputs(weight, x) + bias, q, moved, x)
    assert quadratic(q, objective) == pytest.approx(expected, rel=1e-4)  # H and the means are rounded to float32
    # and centring is no formality: with the bias left where it was the error is another
    assert squared_error(dense_outputs(weight, x) + bias, q, bias, x) > 1.1 * expected


@pytest.mark.parametrize("inputs", ["x", "dense", "gap"])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_bias_does_better(inputs, seed):
    weight, x = random_weight(ROWS, FEATURES, seed), tokens(seed)
    dense, gap = drifted(x, seed), some_gap(x, seed)
    given = {"x": (x,), "dense": (x, dense), "gap": (x, dense, gap)}[inputs]
    wanted = dense_outputs(weight, x if inputs == "x" else dense) + (gap if inputs == "gap" else 0)
    q = weight + 0.05 * torch.randn(ROWS, FEATURES, generator=generator(seed))
    shift = built(weight, *given).bias_shift(q).double()
    least = squared_error(wanted, q, shift, x)
    assert close(shift, (wanted - x.double() @ q.double().T).mean(0))
    for row in range(ROWS):
        for step in (-1e-2, 1e-2):
            other = shift.clone()
            other[row] += step
            # one output's bias off by s costs s^2, give or take 2 s times the rounding of the shift, about 1e-7
            assert squared_error(wanted, q, other, x) == pytest.approx(least + step**2, abs=1e-7)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_alpha_one_is_the_damped_regression_on_the_dense_outputs(has_bias, seed):
    weight, x = random_weight(ROWS, FEATURES, seed), tokens(seed)
    dense = drifted(x, seed)
    wanted = dense_outputs(weight, dense)
    target = built(weight, x, dense, has_bias=has_bias, alpha=1.0).target
    expected = regression(wanted, weight, x, has_bias)
    assert close(target, expected)
    assert not close(weight, expected, 0.1)
    least = damped_cost(wanted, target, weight, x, has_bias)
    for trial in range(20):
        step = torch.randn(ROWS, FEATURES, generator=generator(trial)) * 0.003
        assert damped_cost(wanted, target + step, weight, x, has_bias) > least


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("alpha", "stream_alpha"), [(1, 1), (1, 0), (0.5, 0.5), (0.25, 0.75), (0.5, 0)])
def test_alphas_go_that_part_of_the_way_to_the_regressions(alpha, stream_alpha, has_bias):
    weight, x = random_weight(ROWS, FEATURES), tokens()
    dense, gap = drifted(x), some_gap(x)
    objective = built(weight, x, dense, gap, has_bias=has_bias, alpha=alpha, stream_alpha=stream_alpha)
    own = regression(dense_outputs(weight, dense), weight, x, has_bias)
    stream = regression(dense_outputs(weight, dense) + gap, weight, x, has_bias)
    assert not close(own, stream, 0.1)
    assert close(objective.target, weight + alpha * (own - weight) + stream_alpha * (stream - own))


@pytest.mark.parametrize("stream_alpha", [0.0, 1.0])
@pytest.mark.parametrize("has_bias", [True, False])
def test_alpha_zero_is_the_weight_itself(has_bias, stream_alpha):
    weight, x = random_weight(ROWS, FEATURES), tokens()
    for given in ((x,), (x, drifted(x)), (x, drifted(x), some_gap(x))):
        assert torch.equal(
            built(weight, *given, has_bias=has_bias, alpha=0.0, stream_alpha=stream_alpha).target, weight
        )


def test_without_the_dense_models_inputs_alpha_counts_for_nothing():
    weight = random_weight(ROWS, FEATURES)
    assert torch.equal(built(weight, tokens(), alpha=1.0).target, weight)


@pytest.mark.parametrize("settings", [{"has_bias": False}, {"centre": False}], ids=str)
def test_without_a_bias_or_centring_nothing_is_centred_and_no_bias_moves(settings):
    weight, x = random_weight(ROWS, FEATURES), tokens()
    objective = built(weight, x, drifted(x), some_gap(x), **settings)
    assert objective.bias_shift(weight * 0.9) is None
    moment = x.double().T @ x.double() / TOKENS
    assert close(objective.input.hessian, moment, 1e-6)  # float32 sums
    q = weight + 0.02 * torch.randn(ROWS, FEATURES, generator=generator())
    plain = built(weight, x, alpha=0.0, **settings)
    assert quadratic(q, plain) == pytest.approx(squared_error(dense_outputs(weight, x), q, 0.0, x), rel=1e-5)  # float32


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dead_inputs_have_zero_target_columns_and_leave_the_others_alone(alpha, has_bias):
    weight, x = random_weight(ROWS, FEATURES), tokens()
    live = torch.ones(FEATURES, dtype=torch.bool)
    live[[0, 5, FEATURES - 1]] = False
    x[:, ~live] = 0
    dense, gap = drifted(x), some_gap(x)
    dense[:, ~live] = 0
    objective = built(weight, x, dense, gap, has_bias=has_bias, alpha=alpha)
    assert not objective.target[:, ~live].any()
    alone = built(weight[:, live], x[:, live], dense[:, live], gap, has_bias=has_bias, alpha=alpha)
    assert close(objective.target[:, live], alone.target.double(), 1e-5)  # float32, the same sums in another order


def test_the_bias_takes_over_what_a_constant_input_gave():
    weight, x = random_weight(ROWS, FEATURES), tokens()
    x[:, 4] = 2.0
    objective = built(weight, x, alpha=0.0)
    assert not objective.target[:, 4].any()
    q = objective.target
    assert squared_error(dense_outputs(weight, x), q, objective.bias_shift(q), x) < 1e-10  # outputs are of order 1


def test_a_linear_that_saw_no_token_is_refused_by_name():
    with pytest.raises(ValueError, match=r"layers\.2\.fc1 saw no token"):
        make_objective(random_weight(4, 8), InputStatistics(8), Parts(), has_bias=True, name="layers.2.fc1")
