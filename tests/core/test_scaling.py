"""Scales of input channels: what they leave as it is, where they help, and how their exponent is chosen."""

from dataclasses import replace

import pytest
import torch
from oracles import correlated_inputs, damped, generator, output_error, random_weight, second_moment, sparsegpt

from sgpt_lightning.core.budget import mean_code_bits
from sgpt_lightning.core.importance import channel_importance
from sgpt_lightning.core.linear import LinearProblem
from sgpt_lightning.core.masks import MaskRule
from sgpt_lightning.core.objective import make_objective
from sgpt_lightning.core.scaling import channel_scale, scaled_problem
from sgpt_lightning.core.solver import compress_linear
from sgpt_lightning.core.sweep import sweep
from sgpt_lightning.presets import Parts, Scaling
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

SEARCH, HALF = Scaling("search"), Scaling("fixed", 0.5)


def outlier_inputs(tokens: int, in_features: int, size: float = 100.0) -> torch.Tensor:
    """Inputs of which every sixteenth channel is `size` times as large."""
    inputs = correlated_inputs(tokens, in_features)
    inputs[:, ::16] *= size
    return inputs


def powers_of_two(in_features: int) -> torch.Tensor:
    return 2.0 ** torch.randint(-4, 5, (in_features,), generator=generator(7))


def pose(weight, statistics, recipe: Recipe, *, act_order: bool = False) -> LinearProblem:
    objective = make_objective(weight, statistics, Parts(), has_bias=True, damp_percent=0.01)
    columns = objective.input.act_ordered if act_order else objective.input.natural
    ones = torch.ones(weight.shape[1], dtype=torch.float64)
    return LinearProblem(objective, columns, recipe, ones, torch.ones(len(weight)), "")


@pytest.mark.parametrize("n_m", [None, (2, 4)])
def test_pruning_alone_does_not_change_by_a_bit_whatever_the_scales(collect, n_m):
    weight, d = random_weight(24, 64), powers_of_two(64)
    problem = pose(weight, collect(outlier_inputs(300, 64)), Recipe())
    scaled = scaled_problem(problem, (1 / d).half())
    rule = MaskRule(0.5, n_m)
    plain = sweep(weight.T, problem.columns.factor.hinv_chol, rule, None, 32)
    other = sweep((weight * d).T, scaled.columns.factor.hinv_chol, rule, None, 32)
    assert torch.equal(other.drop, plain.drop)
    assert torch.equal(other.weight / d[:, None], plain.weight)
    assert plain.drop.double().mean() == 0.5


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("scaling", [HALF, SEARCH], ids=lambda s: s.mode)
def test_a_recipe_that_only_prunes_gives_what_it_gave_without_scales(collect, scaling, pattern):
    weight, statistics = random_weight(24, 64), collect(outlier_inputs(300, 64))
    recipe = Recipe(target_avg_bits=None, pattern=pattern)
    plain = compress_linear(weight, statistics, recipe)
    scaled = compress_linear(weight, statistics, replace(recipe, scaling=scaling))
    assert torch.equal(scaled.weight(), plain.weight())
    assert scaled.scaling_alpha is None


@pytest.mark.parametrize("act_order", [False, True])
def test_the_factor_and_the_hessian_are_those_of_the_damped_matrix_in_other_units(collect, act_order):
    inputs, d = outlier_inputs(400, 48), 0.5 + torch.rand(48, generator=generator(3)) * 3
    weight, centred = random_weight(20, 48), inputs - inputs.mean(0)
    scale = (1 / d).half()
    d = 1 / scale.double()
    problem = pose(weight, collect(inputs), Recipe(), act_order=act_order)
    scaled = scaled_problem(problem, scale)
    expected = damped(second_moment(centred)) / torch.outer(d, d)  # damped first, scaled then
    assert torch.allclose(scaled.objective.input.damped.double(), expected, rtol=1e-4, atol=1e-7)
    factor, order = scaled.columns.factor.hinv_chol.double(), scaled.columns.order
    found = factor.T @ factor @ (expected if order is None else expected[order][:, order])
    assert torch.allclose(found, torch.eye(48, dtype=torch.float64), atol=1e-2)  # 1e-4 of a condition number of 1e5
    stored = random_weight(20, 48, seed=1)
    assert torch.allclose(scaled.row_costs(stored * d.float()), problem.row_costs(stored), rtol=1e-4)


def test_widths_are_dealt_by_the_scores_of_the_scaled_weight_and_the_scaled_input(collect):
    weight, inputs, d = random_weight(16, 32), correlated_inputs(300, 32), powers_of_two(32)
    problem = pose(weight, collect(inputs), Recipe())
    scaled = scaled_problem(problem, (1 / d).half())
    inverse = torch.linalg.inv(damped(second_moment(inputs - inputs.mean(0))) / torch.outer(d, d).double())
    expected = channel_importance(weight * d, collect(inputs / d), inverse.diagonal(), Recipe().importance)
    assert torch.allclose(scaled.importance, expected, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"sparsity": 0.5}], ids=str)
def test_fixed_scales_give_the_papers_loop_on_the_scaled_matrix(collect, plain_recipe, settings):
    weight, inputs = random_weight(32, 64), outlier_inputs(400, 64, 10)
    recipe = plain_recipe(target_avg_bits=3, **settings)
    result = compress_linear(weight, collect(inputs), replace(recipe, scaling=HALF))
    ratio = (inputs.double().abs().mean(0) / weight.double().abs().amax(0)).sqrt()
    scale = (1 / (ratio / ratio.log().mean().exp()).clamp(1 / 16, 16)).half()
    assert torch.equal(result.solution.channel_scale, scale)
    d = 1 / scale.double()
    hessian = damped(second_moment(inputs)) / torch.outer(d, d)
    hessian -= hessian.diagonal().mean() * 0.01 / 1.01 * torch.eye(64)  # which the reference will add
    reference = sparsegpt(weight * d, hessian, bits=3, block_size=32, **settings).weight / d
    assert output_error(weight, result.weight(), inputs) == pytest.approx(
        output_error(weight, reference, inputs), rel=2e-3
    )
    assert ((result.weight().double() - reference).abs() < 1e-5).double().mean() > 0.99


def test_scales_have_geometric_mean_1_stay_within_16_and_leave_dead_channels_alone():
    weight, size = random_weight(16, 40), torch.logspace(-1, 1, 40, dtype=torch.float64)
    size[3], weight[:, 5] = 0, 0
    for alpha in (0.1, 0.5, 1.0):
        d = 1 / channel_scale([weight], size, alpha).double()
        assert d[3] == d[5] == 1
        assert d.log().mean() == pytest.approx(0, abs=1e-3)  # float16 rounds by 5e-4 at most
    steep = 1 / channel_scale([weight], size**4, 1.0).double()
    assert (steep.min(), steep.max()) == (1 / 16, 16)
    assert torch.equal(channel_scale([weight], size, 0.0), torch.ones(40, dtype=torch.float16))
    assert torch.equal(channel_scale([weight * 0], size, 1.0), torch.ones(40, dtype=torch.float16))


@pytest.mark.parametrize("settings", [{}, {"sparsity": 0.5}, {"allocation": "loss"}], ids=str)
def test_alpha_0_is_bit_for_bit_what_there_is_without_scales(collect, settings):
    weight, statistics = random_weight(24, 64), collect(outlier_inputs(300, 64))
    recipe = Recipe(**{"sparsity": 0, "target_bits_per_weight": 5.5} | settings)
    plain = compress_linear(weight, statistics, recipe)
    zero = compress_linear(weight, statistics, replace(recipe, scaling=Scaling("fixed", 0)))
    assert zero.solution.channel_scale is None
    assert torch.equal(zero.solution.codes, plain.solution.codes)
    assert torch.equal(zero.weight(), plain.weight())
    assert (plain.scaling_alpha, zero.scaling_alpha) == (None, 0)


@pytest.mark.parametrize("preset", ["best", "gptq"])
@pytest.mark.parametrize("bits", [3, 4])
def test_outliers_in_the_input_cost_less_with_scales(collect, preset, bits):
    weight, inputs = random_weight(32, 192), outlier_inputs(400, 192)
    weight[:, ::16] /= 30
    recipe = Recipe(preset=preset, sparsity=0, target_avg_bits=bits, allocation="uniform")
    plain, searched = (
        compress_linear(weight, collect(inputs), replace(recipe, scaling=s)) for s in (Scaling(), SEARCH)
    )
    assert searched.scaling_alpha > 0
    assert output_error(weight, searched.weight(), inputs) < 0.5 * output_error(weight, plain.weight(), inputs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "settings",
    [{"sparsity": 0, "target_avg_bits": 3}, {"target_bits_per_weight": 4.5}, {"pattern": "2:4", "preset": "sparsegpt"}],
    ids=str,
)
def test_a_search_never_ends_above_any_alpha_that_it_tries(collect, settings, seed):
    weight, statistics = random_weight(24, 32, seed), collect(correlated_inputs(300, 32, seed))
    recipe = Recipe(**settings)
    searched = compress_linear(weight, statistics, replace(recipe, scaling=SEARCH))
    errors = {
        step / 10: compress_linear(weight, statistics, replace(recipe, scaling=Scaling("fixed", step / 10)))
        for step in range(11)
    }
    least = min(result.relative_error for result in errors.values())
    assert searched.relative_error == pytest.approx(least, rel=1e-6)
    assert searched.scaling_alpha == min(a for a, result in errors.items() if result.relative_error == least)


def test_ties_go_to_the_smaller_alpha(collect):
    codes = torch.randint(0, 16, (16, 32), generator=generator(1)).float()
    codes[:, 0], codes[:, 1] = 0, 15  # on the grid of its own row, whatever a power of two makes of a column
    result = compress_linear(
        codes / 64, collect(correlated_inputs(200, 32)), Recipe(preset="gptq", target_avg_bits=4, scaling=SEARCH)
    )
    assert (result.relative_error, result.scaling_alpha) == (0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "sometimes"}, "scaling.mode must be one of none, search, fixed, got 'sometimes'"),
        ({"mode": "fixed"}, "scaling.alpha goes with mode fixed and with no other, got None and fixed"),
        ({"mode": "search", "alpha": 0.5}, "scaling.alpha goes with mode fixed and with no other, got 0.5 and search"),
        ({"mode": "fixed", "alpha": 1.5}, r"scaling.alpha must be in \[0, 1\], got 1.5"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        Scaling(**settings)


def test_scales_are_refused_where_every_channel_has_a_step():
    with pytest.raises(ValueError, match=r"scaling belongs to coding fixed.*scaling\.mode=search"):
        Recipe(coding="entropy", target_bits_per_weight=3, scaling=SEARCH)
    with pytest.raises(TypeError, match="scaling must be Scaling, got 'search'"):
        Recipe(scaling="search")


def test_a_budget_in_true_bits_pays_for_the_scales(collect):
    weight, statistics = random_weight(24, 64), collect(outlier_inputs(300, 64))
    recipe = Recipe(sparsity=0, allocation="rows", target_bits_per_weight=4.9, scaling=HALF)
    few = compress_linear(weight, statistics, recipe).solution
    spent = float(few.widths.double().mean())
    assert spent <= mean_code_bits(replace(recipe, scaling=Scaling()), (24, 64), "output", recipe.widths) - 16 / 24
