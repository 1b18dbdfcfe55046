"""Linears that share an input are solved in one call, each as it would be alone."""

import pytest
import torch
from oracles import correlated_inputs, generator, random_weight

from sgpt_lightning.core.solver import LinearToSolve, compress_linear, compress_linears
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = (16, 24, 8)
"""q, k and v of a model with fewer keys than queries."""
RECIPES = {
    "published": {"preset": "sparsegpt", "target_avg_bits": 4},
    "published 2:4": {"preset": "sparsegpt", "pattern": "2:4", "target_avg_bits": 4},
    "pruned": {"preset": "sparsegpt", "target_avg_bits": None},
    "groups": {"preset": "gptq", "target_avg_bits": 3, "group_size": 16},
    "columns": {"preset": "sparsegpt", "target_avg_bits": 3.5, "allocation": "loss"},
    "best": {"target_avg_bits": 3.5},
    "best 2:4": {"pattern": "2:4", "target_avg_bits": 3},
    "best dense": {"sparsity": 0, "target_avg_bits": 3.5},
    "best uniform": {"allocation": "uniform", "target_avg_bits": 4},
}


@pytest.mark.parametrize("case", RECIPES)
def test_each_is_solved_as_it_would_be_alone(case, collect):
    recipe = Recipe(**RECIPES[case])
    statistics = collect(correlated_inputs(300, 64))
    linears = [
        LinearToSolve(random_weight(rows, 64, rows), f"linear {rows}", torch.rand(rows, generator=generator(rows)))
        for rows in ROWS
    ]
    together = compress_linears(linears, statistics, recipe, torch.float32, has_bias=True)
    for linear, result in zip(linears, together, strict=True):
        alone = compress_linear(
            linear.weight, statistics, recipe, linear.name, torch.float32, has_bias=True, row_weights=linear.row_weights
        )
        # Products of other shapes round differently in the last bit, and a code or a weight near a tie may follow.
        assert (result.weight() - alone.weight()).abs().gt(1e-4).double().mean() < 0.02
        assert result.relative_error == pytest.approx(alone.relative_error, rel=0.02)
        assert result.importance_range == pytest.approx(alone.importance_range)
        assert (result.allocation, result.status) == (alone.allocation, alone.status)
        if recipe.prunes:
            assert int((~result.solution.keep).sum()) == linear.weight.numel() // 2


def test_what_is_wrong_with_one_of_several_is_said_of_that_one(collect):
    statistics, recipe = collect(correlated_inputs(300, 64)), Recipe(preset="sparsegpt")
    good, bad = LinearToSolve(random_weight(8, 64), "q_proj"), LinearToSolve(random_weight(8, 64), "k_proj")
    bad.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"the weight of k_proj holds 1 NaN or inf of 512 entries"):
        compress_linears([good, bad], statistics, recipe)


def test_a_weight_on_another_device_than_its_inputs_is_refused_by_name(collect):
    statistics = collect(correlated_inputs(300, 64))
    with pytest.raises(ValueError, match=r"the weight of q_proj is on meta, what it received on cpu"):
        compress_linear(random_weight(8, 64).to("meta"), statistics, Recipe(preset="sparsegpt"), "q_proj")
