"""The rate-coded solve against a column loop in float64, brute force and arithmetic by hand."""

import math

import pytest
import torch
from oracles import correlated_inputs, damped, generator, random_weight, second_moment, textbook_factor
from torch import Tensor

from sgpt_lightning.core.linear import LinearProblem
from sgpt_lightning.core.objective import make_objective
from sgpt_lightning.core.rate import RateProblem, rate_problem, solve_rates, sweep_at
from sgpt_lightning.core.solution import Coded, SolveError, power_of_two
from sgpt_lightning.core.solver import LinearToSolve, compress_linears
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, COLUMNS = 48, 64
RECIPE = Recipe(coding="entropy", target_bits_per_weight=3.0, parts={"centre": False, "alpha": 0})


def entropy_bytes(codes: Tensor) -> int:
    """Bytes by the entropy of the codes, all in one class: a coder that knows nothing of rows and columns."""
    counts = torch.unique(codes, return_counts=True)[1].double()
    return math.ceil(float(-(counts * (counts / codes.numel()).log2()).sum()) / 8)


@pytest.fixture
def posed(collect):
    """Pose a linear of given rows, row weights and seed on the same inputs."""
    inputs = correlated_inputs(400, COLUMNS)
    statistics = collect(inputs)

    def pose(weight: Tensor | None = None, row_weights: Tensor | None = None, seed: int = 0) -> RateProblem:
        weight = random_weight(ROWS, COLUMNS, seed) if weight is None else weight
        objective = make_objective(weight, statistics, RECIPE.solve_parts, has_bias=False, damp_percent=0.03)
        weights = torch.ones(len(weight)) if row_weights is None else row_weights
        columns = objective.input.natural
        return rate_problem(LinearProblem(objective, columns, RECIPE, torch.ones(COLUMNS), weights, "fc1"))

    return pose


def loop(weight: Tensor, factor: Tensor, steps: Tensor) -> Tensor:
    """Round column by column to whole steps, feeding errors forward, float64 `[out_features, in_features]`."""
    left, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.int32)
    for column in range(weight.shape[1]):
        codes[:, column] = (left[:, column] / steps[column]).round().int()
        error = (left[:, column] - codes[:, column] * steps[column]) / factor[column, column]
        left[:, column:] -= torch.outer(error, factor[column, column:])
    return codes


def test_codes_are_those_of_a_plain_column_loop_on_steps_in_proportion_to_the_factor(posed):
    linear = posed()
    factor = textbook_factor(damped(second_moment(correlated_inputs(400, COLUMNS)), 0.03))
    level = 2.0**-3
    steps = linear.step_sizes(level).double()
    # A byte a channel: steps are off by at most half a sixteenth of an octave.
    ratio = (steps / steps.max()).log2() - (factor.diagonal() / factor.diagonal().max()).log2()
    assert ratio.abs().max() <= 1 / 32 + 1e-5
    (codes,) = sweep_at([linear], [level])
    assert (codes == loop(random_weight(ROWS, COLUMNS), factor, steps)).double().mean() > 0.999


def test_powers_of_two_are_the_nearest_float32_numbers_also_far_out():
    for octave in (8, 16):
        found = power_of_two(torch.arange(256, dtype=torch.uint8), octave)
        expected = torch.tensor([2.0 ** (-index / octave) for index in range(256)], dtype=torch.float64).float()
        assert torch.equal(found, expected)


def test_the_weight_is_code_times_step_times_row_scale_each_product_rounded():
    codes = torch.randint(-40, 40, (5, 7), generator=generator(0), dtype=torch.int32)
    steps, rows = torch.arange(0, 70, 10, dtype=torch.uint8), torch.tensor([0, 3, 8, 20, 255], dtype=torch.uint8)
    weight = Coded(codes, torch.tensor([0.3]), steps, rows).weight()
    for r in range(5):
        for c in range(7):
            step = torch.tensor(0.3) * torch.tensor(2.0 ** (-int(steps[c]) / 16))
            expected = torch.tensor(float(codes[r, c])) * step * torch.tensor(2.0 ** (-int(rows[r]) / 8))
            assert weight[r, c] == expected


@pytest.mark.parametrize("rate", [1.2, 2.0, 3.0, 5.0])
def test_the_budget_is_met_from_below(posed, rate):
    linear, weights = posed(), ROWS * COLUMNS
    (coded,) = solve_rates([linear], [rate * weights], entropy_bytes)
    bits = 8 * (entropy_bytes(coded.codes) + 4 + ROWS + COLUMNS)
    assert 0.97 * rate * weights <= bits <= rate * weights  # of so few weights, codes fall in jumps


def test_more_bits_never_mean_more_error(posed):
    linear, errors = posed(), []
    for rate in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0):
        (coded,) = solve_rates([linear], [rate * ROWS * COLUMNS], entropy_bytes)
        errors.append(linear.problem.objective.relative_error(coded.weight()))
    assert errors == sorted(errors, reverse=True)
    # Six decibels a bit, as for any quantizer of high rate.
    assert 3 < (errors[-2] / errors[-1]) ** 0.5 < 5.5


def test_row_weights_make_rows_that_cost_more_finer_and_a_scaled_row_scales_its_output(posed):
    weight, weights = random_weight(ROWS, COLUMNS), torch.ones(ROWS)
    plain = posed(weight)
    assert not plain.rows.any()  # equal rows need no scales
    weights[:4] = 16.0
    (coded,) = solve_rates([posed(weight, weights)], [3.0 * ROWS * COLUMNS], entropy_bytes)
    errors = (coded.weight() - weight).square().mean(1)
    assert 10 < errors[4:].mean() / errors[:4].mean() < 25
    doubled = weight.clone()
    doubled[7] *= 2
    quarter = torch.ones(ROWS)
    quarter[7] = 0.25  # the same error in proportion
    same, scaled = (sweep_at([linear], [0.1])[0] for linear in (posed(weight), posed(doubled, quarter)))
    # The scale that is stored is relative to the cheapest row's, so all other rows are a level finer.
    half = sweep_at([posed(doubled, quarter)], [0.2])[0]
    assert torch.equal(half, same)
    assert not torch.equal(scaled, same)


def test_linears_that_share_an_input_are_solved_as_alone(posed):
    linears = [posed(seed=seed) for seed in range(3)]
    budgets = [rate * ROWS * COLUMNS for rate in (2.0, 3.0, 4.0)]
    for linear, budget, result in zip(linears, budgets, solve_rates(linears, budgets, entropy_bytes), strict=True):
        (alone,) = solve_rates([linear], [budget], entropy_bytes)
        assert (alone.codes == result.codes).double().mean() > 0.98
        assert float(alone.level) == pytest.approx(float(result.level), rel=0.02)


def test_a_budget_below_the_side_information_is_refused_by_name(posed):
    with pytest.raises(SolveError, match=r"fc1 takes 0\.30\d bits a weight before any code is written.*budget of 0\.1"):
        solve_rates([posed()], [0.1 * ROWS * COLUMNS], entropy_bytes)


def test_a_matrix_of_zeros_and_one_of_one_row_are_solved(posed):
    for weight in (torch.zeros(ROWS, COLUMNS), random_weight(1, COLUMNS)):
        (coded,) = solve_rates([posed(weight)], [12.0 * weight.numel()], entropy_bytes)
        assert torch.isfinite(coded.weight()).all()
        assert (coded.weight() - weight).abs().max() <= weight.abs().max() / 4


def test_the_solver_needs_to_know_what_codes_take(collect):
    statistics = collect(correlated_inputs(400, COLUMNS))
    linear = LinearToSolve(random_weight(ROWS, COLUMNS), "fc1")
    with pytest.raises(ValueError, match="coding entropy needs coded_size"):
        compress_linears([linear], statistics, RECIPE)
    (solved,) = compress_linears([linear], statistics, RECIPE, coded_size=entropy_bytes)
    assert isinstance(solved.solution, Coded)
    assert solved.relative_error < 0.02
    half = LinearToSolve(linear.weight, "fc1", bits=1.5 * ROWS * COLUMNS)
    (coarser,) = compress_linears([half], statistics, RECIPE, coded_size=entropy_bytes)
    assert entropy_bytes(coarser.solution.codes) * 8 < 1.5 * ROWS * COLUMNS
