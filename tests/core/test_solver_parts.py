"""Each part of the solve, switched by its name: what it changes, and that it lowers the error that it is meant to."""

from dataclasses import fields

import pytest
import torch
from oracles import correlated_inputs, damped, random_weight, restricted_solve, row_errors, second_moment, sparsegpt

from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.core.problem import SharedInput
from sgpt_lightning.core.pruning import choose_masks
from sgpt_lightning.core.rounding import descend_together, round_to, same_width
from sgpt_lightning.core.solver import LinearToSolve, compress_linear, pose_dense
from sgpt_lightning.presets import PRESETS, Parts
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
OFF = {f.name: type(f.default)(0) for f in fields(Parts)}
SHAPE = (48, 64)


def problem(seed: int = 0):
    """A weight, inputs with a mean, and what the dense model received: the same, less some noise and a shift."""
    g = torch.Generator().manual_seed(seed)
    dense = correlated_inputs(500, SHAPE[1], seed) + torch.randn(SHAPE[1], generator=g) * 0.5
    inputs = dense + 0.3 * torch.randn(dense.shape, generator=g) + 0.2
    return random_weight(*SHAPE, seed), inputs, dense


def outcome(settings: dict, seed: int = 0, *, has_bias: bool = True) -> float:
    """Squared error of the outputs against the dense model's on the tokens themselves, per squared output, float64."""
    weight, inputs, dense = problem(seed)
    statistics = InputStatistics(SHAPE[1])
    statistics.add(inputs, dense)
    result = compress_linear(weight, statistics, Recipe(**settings), "", torch.float32, has_bias=has_bias)
    wanted = dense.double() @ weight.double().T
    got = inputs.double() @ result.weight().double().T
    if result.bias_shift is not None:
        got += result.bias_shift.double()
    return float((got - wanted).square().sum() / wanted.square().sum())


def test_the_preset_sparsegpt_has_no_part_and_best_has_all():
    assert PRESETS["sparsegpt"].parts == PRESETS["gptq"].parts == Parts(**OFF)
    assert all(getattr(Parts(), name) != off for name, off in OFF.items())


@pytest.mark.parametrize(
    ("part", "value"),
    [("centre", True), ("alpha", 1.0), ("descent_passes", 1), ("range_search", True)],
)
@pytest.mark.parametrize("settings", [{"sparsity": 0.5, "target_avg_bits": 3}, {"sparsity": 0, "target_avg_bits": 3}])
def test_a_part_lowers_the_error_of_the_published_solve_by_itself(part, value, settings):
    gains = []
    for seed in range(3):
        plain = outcome({"preset": "sparsegpt", **settings}, seed)
        gains.append(outcome({"preset": "sparsegpt", **settings, "parts": {part: value}}, seed) / plain)
    assert sum(gains) / 3 < 0.97


@pytest.mark.parametrize(("part", "value"), [("mask_steps", 30), ("refit_steps", 20)])
@pytest.mark.parametrize("bits", [None, 3])
def test_mask_and_refit_lower_the_error_of_a_pruned_matrix_by_themselves(part, value, bits):
    settings = {"preset": "sparsegpt", "target_avg_bits": bits}
    gains = [outcome({**settings, "parts": {part: value}}, seed) / outcome(settings, seed) for seed in range(3)]
    assert sum(gains) / 3 < 0.99


def test_act_order_lowers_the_error_of_a_dense_matrix():
    # With a mask it may raise it: on opt-mini SparseGPT at 50 % + 4 bit does better without.
    settings = {"preset": "gptq", "target_avg_bits": 3}
    gains = [outcome({**settings, "parts": {"act_order": True}}, s) / outcome(settings, s) for s in range(3)]
    assert sum(gains) / 3 < 0.97


def test_no_code_for_zero_pays_where_codes_are_few():
    settings = {"preset": "sparsegpt", "target_avg_bits": 2}
    with_zero, without = (
        outcome({**settings, "parts": {"mask_steps": 30, "range_search": True, "zero_free": switched}})
        for switched in (False, True)
    )
    assert without < 0.95 * with_zero


@pytest.mark.parametrize("part", ["centre", "alpha", "mask_steps", "range_search", "descent_passes", "zero_free"])
def test_the_whole_solve_misses_a_part_that_is_switched_off(part):
    settings = {"target_avg_bits": 2, "allocation": "uniform"}
    losses = [outcome(settings | {"parts": {part: OFF[part]}}, seed) / outcome(settings, seed) for seed in range(3)]
    assert sum(losses) / 3 > 1.01


@pytest.mark.parametrize("settings", [{"target_avg_bits": 2}, {"target_avg_bits": 4}, {"pattern": "2:4"}], ids=str)
def test_one_solve_for_mask_and_codes_is_below_pruning_and_then_quantizing(collect, settings):
    weight, inputs, _ = problem()
    statistics = collect(inputs)
    hessian = damped(second_moment(inputs))
    recipe = Recipe(allocation="uniform", **settings)
    solved = compress_linear(weight, statistics, recipe, "", torch.float32)
    n_m = recipe.n_m
    bits = int(recipe.target_avg_bits)
    pruned = sparsegpt(weight, hessian, sparsity=0.5, n_m=n_m)  # the paper's mask and weights ...
    after = sparsegpt(pruned.weight.float(), hessian, bits=bits, drop=pruned.drop)  # ... and GPTQ on what is left
    exact = restricted_solve(weight, hessian, pruned.drop)
    after_exact = sparsegpt(exact.float(), hessian, bits=bits, drop=pruned.drop)
    error, *others = (
        float(row_errors(weight, result, hessian).sum())
        for result in (solved.weight(), after.weight, after_exact.weight)
    )
    assert int((solved.weight() == 0).sum()) == SHAPE[0] * SHAPE[1] // 2
    assert error < 0.9 * min(others)


def test_rows_that_cost_more_keep_more_weights_and_get_more_bits(collect):
    weight, inputs, _ = problem()
    costs = torch.ones(SHAPE[0])
    costs[:16], costs[16:32] = 100, 0.01
    recipe = Recipe(target_avg_bits=3.5)
    result = compress_linear(weight, collect(inputs), recipe, "", torch.float32, row_weights=costs)
    kept = result.solution.keep.double().mean(1)
    widths = result.solution.widths.double()
    assert kept[:16].mean() > kept[32:].mean() > kept[16:32].mean()
    assert widths[:16].mean() > 1 + widths[16:].mean()
    assert float((widths * result.solution.keep.sum(1)).sum() / result.solution.keep.sum()) <= 3.5
    hessian = damped(second_moment(inputs))
    plain = compress_linear(weight, collect(inputs), recipe, "", torch.float32)
    weighted = [float((row_errors(weight, r.weight(), hessian) * costs).sum()) for r in (result, plain)]
    assert weighted[0] < 0.5 * weighted[1]


def test_row_weights_of_any_size_and_rows_of_none_are_taken(collect):
    weight, inputs, _ = problem()
    recipe = Recipe(target_avg_bits=3)
    costs = torch.rand(SHAPE[0], generator=torch.Generator().manual_seed(0)) + 0.5
    results = [
        compress_linear(weight, collect(inputs), recipe, row_weights=costs * factor).weight() for factor in (1, 2.0**60)
    ]
    assert torch.equal(*results)
    assert compress_linear(weight, collect(inputs), recipe, row_weights=torch.zeros(SHAPE[0])).weight().isfinite().all()


@pytest.mark.parametrize("allocation", ["quantile", "budget", "loss", "rows"])
def test_one_width_is_kept_where_it_does_better_and_the_result_says_so(collect, allocation):
    weight, inputs, _ = problem()
    errors = {}
    for tried in (True, False):
        recipe = Recipe(target_avg_bits=4, allocation=allocation, uniform_if_better=tried, parts={"act_order": False})
        result = compress_linear(weight, collect(inputs), recipe, "", torch.float32)
        errors[tried] = float(row_errors(weight, result.weight(), damped(second_moment(inputs))).sum())
        assert result.allocation == ("uniform" if len(result.solution.widths.unique()) == 1 else allocation)
    alone = compress_linear(weight, collect(inputs), Recipe(target_avg_bits=4, allocation="uniform"), "", torch.float32)
    one_width = float(row_errors(weight, alone.weight(), damped(second_moment(inputs))).sum())
    # Compared before the descent, which moves either by a few per cent.
    assert errors[True] <= 1.05 * min(errors[False], one_width)


@pytest.mark.parametrize("group_size", [8, 16])
def test_groups_do_better_than_one_range_a_row(collect, group_size):
    weight, inputs, _ = problem()
    for settings in ({"sparsity": 0}, {"sparsity": 0.5}):
        errors = [
            compress_linear(
                weight, collect(inputs), Recipe(target_avg_bits=2, allocation="uniform", group_size=size, **settings)
            ).relative_error
            for size in (None, group_size)
        ]
        assert errors[1] < errors[0]


def test_a_budget_of_true_bits_that_cannot_be_met_is_refused_by_name(collect):
    weight, inputs, _ = problem()
    with pytest.raises(ValueError, match=r"at least [\d.]+ for layers\.3\.fc1 \(48 x 64\).*got 1\.5"):
        compress_linear(weight, collect(inputs), Recipe(target_bits_per_weight=1.5), "layers.3.fc1")


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_n_m_holds_after_every_stage_of_the_whole_solve(collect, pattern, bits):
    n, m = map(int, pattern.split(":"))
    inputs, recipe = SharedInput(collect(correlated_inputs(300, 48))), Recipe(pattern=pattern, target_avg_bits=bits)
    linears = [LinearToSolve(random_weight(12, 48, seed), "", torch.ones(12)) for seed in (0, 1)]
    problems = [pose_dense(linear, inputs, recipe) for linear in linears]
    starts = choose_masks(problems, problems[0].objective.input.natural)
    rounded = round_to(problems, starts, [same_width(start, bits) for start in starts], "input")
    descended = descend_together(problems, rounded)
    for start, before, after in zip(starts, rounded, descended, strict=True):
        assert torch.equal(before.drop, start.mask)
        assert torch.equal(after.drop, start.mask)
        for weight in (start.weight, before.stored, after.stored):
            zeros = (weight == 0).view(12, -1, m).sum(2)
            assert (zeros == n).all()  # zero-free grids store no other zeros
        assert not torch.equal(before.stored, after.stored)  # the descent has done something
