"""Inputs that make Hessians difficult: solved to nothing worse than plain rounding, or refused by name."""

import pytest
import torch
from oracles import correlated_inputs, random_weight

from sgpt_lightning.core.hessian import HessianError
from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.core.nearest import round_plainly
from sgpt_lightning.core.solution import SolveError
from sgpt_lightning.core.solver import LinearToSolve, compress_linears
from sgpt_lightning.format.entropy import coded_size
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
COLUMNS = 32
WEIGHT = random_weight(24, COLUMNS)
INPUTS = correlated_inputs(300, COLUMNS)
RECIPES = {
    "best": {"target_avg_bits": 4.0, "sparsity": 0.5},
    "gptq": {"preset": "gptq", "target_avg_bits": 3.0},
    "pruned": {"target_avg_bits": None},
    "coded": {"coding": "entropy", "target_bits_per_weight": 5.0},
}


def changed(**columns):
    """The inputs with one entry, or some columns, replaced."""
    inputs = INPUTS.clone()
    if "entry" in columns:
        inputs[3, 4] = columns["entry"]
    for index, value in columns.get("at", {}).items():
        inputs[:, index] = value
    return inputs


DIFFICULT = {
    "one token": INPUTS[:1],
    "fewer tokens than inputs": INPUTS[:5],
    "inputs that are zero": changed(at=dict.fromkeys(range(0, COLUMNS, 3), 0.0)),
    "a constant input": changed(at={5: 7.0}),
    "nothing but constants": torch.linspace(-2, 2, COLUMNS).expand(50, COLUMNS).clone(),
    "twins": changed(at={4: INPUTS[:, 5]}),
    "an outlier": changed(entry=1e15),
    "thirty orders of magnitude": INPUTS * torch.logspace(-15, 15, COLUMNS),
}
HOPELESS = {
    "zeros": (torch.zeros(50, COLUMNS), "every input of layers.3.fc1 is zero"),
    "squares below float32": (1e-30 * INPUTS, "every input of layers.3.fc1 is zero"),
    "squares above float32": (1e25 * INPUTS, "Hessian of layers.3.fc1 holds NaN or inf"),
    "sums of squares above float32": (2.5e18 * torch.ones(64, COLUMNS), "Hessian of layers.3.fc1 holds NaN or inf"),
    "NaN": (changed(entry=float("nan")), "Hessian of layers.3.fc1 holds NaN or inf"),
    "inf": (changed(entry=float("inf")), "Hessian of layers.3.fc1 holds NaN or inf"),
}


def solve(inputs, recipe, *, has_bias=False, follows_dense=True):
    statistics = InputStatistics(COLUMNS)
    statistics.add(inputs, 1.01 * inputs if follows_dense else None)
    linear = LinearToSolve(WEIGHT, "layers.3.fc1")
    (result,) = compress_linears([linear], statistics, recipe, has_bias=has_bias, coded_size=coded_size)
    return result


def output_error(inputs, result):
    """Squared output error over squared output, in float64."""
    x, w = inputs.double(), WEIGHT.double()
    shift = 0 if result.bias_shift is None else result.bias_shift.double()
    return float((x @ (result.weight().double() - w).T + shift).square().sum() / (x @ w.T).square().sum())


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", DIFFICULT)
def test_difficult_inputs_are_solved_and_no_worse_than_by_plain_rounding(kind, recipe, has_bias):
    inputs, settings = DIFFICULT[kind], Recipe(**RECIPES[recipe])
    result = solve(inputs, settings, has_bias=has_bias, follows_dense=False)
    assert result.status in ("ok", "damped", "float64")
    assert torch.isfinite(result.weight()).all()
    # GPTQ comes to plain rounding where one input outweighs all others: damping then decides.
    assert output_error(inputs, result) <= output_error(inputs, round_plainly(WEIGHT, settings, coded_size=coded_size))


@pytest.mark.parametrize("follows_dense", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", HOPELESS)
def test_hopeless_inputs_are_an_error_by_name_or_a_declared_rounding(kind, recipe, has_bias, follows_dense):
    inputs, message = HOPELESS[kind]
    settings = RECIPES[recipe]
    with pytest.raises((HessianError, SolveError), match=message):
        solve(inputs, Recipe(**settings), has_bias=has_bias, follows_dense=follows_dense)
    allowed = Recipe(**settings, on_failure="round")
    result = solve(inputs, allowed, has_bias=has_bias, follows_dense=follows_dense)
    assert result.status == "rounded"
    assert message in result.failure
    assert result.bias_shift is None
    assert torch.equal(result.weight(), round_plainly(WEIGHT, allowed, coded_size=coded_size).weight())


def test_of_linears_that_share_an_input_only_those_that_fail_are_rounded():
    statistics = InputStatistics(COLUMNS)
    statistics.add(INPUTS)
    huge = LinearToSolve(WEIGHT * 1e30, "huge")  # whose output's square is beyond float32
    recipe = Recipe(preset="gptq", target_avg_bits=3.0)
    (alone,) = compress_linears([LinearToSolve(WEIGHT, "small")], statistics, recipe)
    together = [LinearToSolve(WEIGHT, "small"), huge]
    with pytest.raises(SolveError, match="relative error of huge"):
        compress_linears(together, statistics, recipe)
    small, rounded = compress_linears(together, statistics, Recipe(**RECIPES["gptq"], on_failure="round"))
    assert (small.status, rounded.status) == ("ok", "rounded")
    assert torch.equal(small.weight(), alone.weight())


def test_a_weight_that_is_not_finite_is_an_error_whatever_is_allowed():
    weight = WEIGHT.clone()
    weight[0, 0] = float("nan")
    statistics = InputStatistics(COLUMNS)
    statistics.add(INPUTS)
    with pytest.raises(SolveError, match="weight of fc1 holds 1 NaN"):
        compress_linears([LinearToSolve(weight, "fc1")], statistics, Recipe(on_failure="round"))
