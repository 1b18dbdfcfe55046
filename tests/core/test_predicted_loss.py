"""What a solve predicts its error to add to the model's loss, against a sum over tokens in float64."""

import pytest
import torch
from oracles import correlated_inputs

from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.core.solver import LinearToSolve, compress_linears
from sgpt_lightning.format.entropy import coded_size
from sgpt_lightning.recipe import Recipe

RECIPES = {
    "pruned": Recipe(preset="sparsegpt", sparsity=0.5, target_avg_bits=None),
    "fixed": Recipe(preset="best", sparsity=0.25, target_avg_bits=3),
    "coded": Recipe(coding="entropy", target_bits_per_weight=5),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_predicted_loss_is_half_the_squared_error_of_each_row_times_its_squared_gradient(recipe, has_bias):
    random = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(24, 32, generator=random), correlated_inputs(300, 32) + 0.5
    costs = torch.rand(24, generator=random) * 1e-3
    statistics = InputStatistics(32)
    statistics.add(inputs)
    linear = LinearToSolve(weight, "fc1", costs)
    (result,) = compress_linears([linear], statistics, recipe, has_bias=has_bias, coded_size=coded_size)
    errors = inputs.double() @ (weight - result.weight()).double().T
    if result.bias_shift is not None:
        errors += -result.bias_shift.double()  # the bias of the compressed linear is that much higher
    expected = 0.5 * float(costs.double() @ errors.square().mean(0))
    assert expected > 1e-6
    # Moments in float32 of inputs whose channels differ by orders of magnitude.
    assert result.predicted_loss == pytest.approx(expected, rel=1e-3)


def test_without_gradients_nothing_is_predicted():
    statistics = InputStatistics(8)
    statistics.add(correlated_inputs(50, 8))
    (result,) = compress_linears([LinearToSolve(torch.ones(4, 8))], statistics, RECIPES["pruned"])
    assert result.predicted_loss is None
