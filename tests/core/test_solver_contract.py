"""What the solver promises whatever the numbers: exact counts, patterns in place, widths, errors, no side effects."""

import math

import pytest
import torch
from oracles import correlated_inputs, output_error, random_weight
from torch import Tensor

from sgpt_lightning.core.grids import fit_affine_grid
from sgpt_lightning.core.hessian import inverse_factor
from sgpt_lightning.core.masks import MaskRule
from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.core.objective import make_objective
from sgpt_lightning.core.scales import ColumnScales
from sgpt_lightning.core.solution import SolveError
from sgpt_lightning.core.solver import LinearToSolve, compress_linear, compress_linears
from sgpt_lightning.core.sweep import sweep
from sgpt_lightning.presets import PRESETS
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
LADDER = (2, 3, 4, 6, 8)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [None, 3])
@pytest.mark.parametrize(
    ("shape", "sparsity"), [((7, 13), 0.5), ((33, 70), 0.35), ((15, 70), 0.01), ((5, 31), 0.99), ((1, 1), 0.4)]
)
def test_exactly_the_asked_fraction_is_removed_for_awkward_shapes(solve, shape, sparsity, bits, act_order):
    result = solve(
        random_weight(*shape), correlated_inputs(200, shape[1]), sparsity=sparsity, target_avg_bits=bits,
        act_order=act_order, block_size=16,
    )  # fmt: skip
    assert int((~result.solution.keep).sum()) == round(sparsity * (shape[0] * shape[1]))
    assert not result.weight()[~result.solution.keep].any()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("allocation", ["uniform", "quantile"])
@pytest.mark.parametrize(("pattern", "block_size"), [("2:4", 6), ("1:4", 128), ("4:8", 10), ("3:5", 1)])
def test_n_m_holds_in_the_original_positions(solve, pattern, block_size, allocation, act_order):
    zeros, group = map(int, pattern.split(":"))
    weight, inputs = random_weight(9, 5 * group), correlated_inputs(200, 5 * group)
    for bits in (None, 4):
        result = solve(
            weight, inputs, pattern=pattern, target_avg_bits=bits, allocation=allocation, act_order=act_order,
            block_size=block_size,
        )  # fmt: skip
        assert ((~result.solution.keep).view(9, 5, group).sum(2) == zeros).all()
        assert not result.weight()[~result.solution.keep].any()


@pytest.mark.parametrize("act_order", [False, True])
def test_nothing_asked_for_leaves_the_weight_as_it_is(solve, act_order):
    weight, inputs = random_weight(12, 40), correlated_inputs(200, 40)
    for sparsity in (0.0, 1e-4):  # 1e-4 of 480 weights rounds to none
        result = solve(weight, inputs, sparsity=sparsity, act_order=act_order)
        assert torch.equal(result.weight(), weight)
        assert result.relative_error == 0


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("allocation", ["quantile", "budget"])
@pytest.mark.parametrize("target", [2.7, 4.0, 5.5])
def test_mean_bits_of_the_survivors_meet_the_target(solve, target, allocation, sparsity):
    weight, inputs = random_weight(24, 96), correlated_inputs(400, 96)
    settings = {"sparsity": sparsity, "target_avg_bits": target, "widths": LADDER, "allocation": allocation}
    result = solve(weight, inputs, **settings)
    survivors = (torch.ones(24, 96) if result.solution.keep is None else result.solution.keep).sum(0)
    left = target * survivors.sum() - (survivors * result.solution.widths).sum()
    assert -1e-3 <= left < 2 * survivors.max()  # less than the widest step of one channel
    levels = sum(2**bits for bits in set(result.solution.widths.tolist()))
    assert len(set(result.solution.widths.tolist())) > 1
    assert all(len(row.unique()) <= levels for row in result.weight())


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_row_holds_no_more_values_than_its_width_has_codes(solve, bits):
    result = solve(random_weight(6, 400), correlated_inputs(500, 400), target_avg_bits=bits, block_size=128)
    distinct = [len(row.unique()) for row in result.weight()]
    assert max(distinct) <= 2**bits
    assert min(distinct) > 2 ** (bits - 1) * 0.7  # and uses the width that it pays for
    assert int(result.solution.codes.max()) < 2**bits


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("sparsity", "allocation"), [(0.0, "uniform"), (0.25, "uniform"), (0.25, "quantile")])
@pytest.mark.parametrize("bits", [None, 4])
def test_dead_inputs_end_as_zero_weights_and_the_rest_does_not_notice(solve, bits, sparsity, allocation, act_order):
    weight, inputs = random_weight(16, 40), correlated_inputs(300, 40)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[0, 13, 39]] = True
    inputs[:, dead] = 0
    settings = {"target_avg_bits": bits, "allocation": allocation, "act_order": act_order}
    result = solve(weight, inputs, sparsity=sparsity, **settings)
    assert not result.weight()[:, dead].any()
    assert torch.isfinite(result.weight()).all()
    if sparsity == 0:
        alone = solve(weight[:, ~dead], inputs[:, ~dead], **settings)
        assert output_error(weight, result.weight(), inputs) == pytest.approx(alone.relative_error, rel=0.02, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_arguments_and_global_state_are_left_alone(collect, plain_recipe, dtype):
    weight, statistics = random_weight(16, 40).to(dtype), collect(correlated_inputs(200, 40))
    before = weight.clone(), statistics.second_moment.clone(), torch.get_rng_state()
    settings = {"sparsity": 0.5, "target_avg_bits": 3.5, "widths": LADDER, "act_order": True}
    result = compress_linear(weight, statistics, plain_recipe(**settings, allocation="quantile"))
    assert result.weight().dtype == torch.float32
    assert torch.equal(weight, before[0])
    assert torch.equal(statistics.second_moment, before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_linear_that_saw_no_token_is_refused_by_name(plain_recipe):
    with pytest.raises(ValueError, match=r"layers\.2\.fc1 saw no token"):
        compress_linear(random_weight(4, 8), InputStatistics(8), plain_recipe(sparsity=0.5), "layers.2.fc1")


def test_a_pattern_that_does_not_divide_the_inputs_is_refused_by_name(solve):
    with pytest.raises(ValueError, match=r"2:4 needs in_features divisible by 4, but layers\.2\.fc1 has 10"):
        solve(random_weight(4, 10), correlated_inputs(50, 10), "layers.2.fc1", pattern="2:4")


@pytest.mark.parametrize("rule", [MaskRule(0.5), MaskRule(0, (2, 4)), torch.zeros(48, 10, dtype=torch.bool), None])
@pytest.mark.parametrize("bits", [None, 3])
def test_the_column_loop_reads_no_value_back(collect, rule, bits):
    # Tensors on the meta device have no values: item(), bool(), float() and masks as indices all raise.
    weight = random_weight(10, 48)
    factor = inverse_factor(collect(correlated_inputs(100, 48)).second_moment).hinv_chol.to("meta")
    with pytest.raises(RuntimeError):
        factor[0, 0].item()
    grid = fit_affine_grid(weight, 8)
    quantizer = None if bits is None else ColumnScales(grid, torch.full((48,), bits), 48)
    if quantizer is not None:
        quantizer.step, quantizer.base = quantizer.step.to("meta"), quantizer.base.to("meta")
    mask = rule.to("meta") if isinstance(rule, Tensor) else rule
    swept = sweep(weight.T.to("meta"), factor, mask, quantizer, 16)
    assert swept.weight.shape == (48, 10)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_weight_that_is_no_number_is_refused_by_name(solve, value, bits):
    weight = random_weight(8, 16)
    weight[3, 5] = value
    with pytest.raises(SolveError, match=r"weight of layers\.7\.fc1 holds 1 NaN or inf of 128 entries"):
        solve(weight, correlated_inputs(100, 16), "layers.7.fc1", sparsity=0.5, target_avg_bits=bits)


def test_survivors_that_overflow_the_stored_dtype_are_refused_by_name(collect, plain_recipe):
    weight = random_weight(8, 16)
    weight[3, 5] = 1e5  # float16 ends at 65,504
    statistics, recipe = collect(correlated_inputs(100, 16)), plain_recipe(sparsity=0.5)
    with pytest.raises(SolveError, match=r"layers\.7\.fc1 would be stored with NaN or inf.*1e\+05.*float16"):
        compress_linear(weight, statistics, recipe, "layers.7.fc1", torch.float16)
    wide = compress_linear(weight, statistics, recipe, "layers.7.fc1", torch.bfloat16)
    assert torch.isfinite(wide.weight()).all()


def test_an_error_without_any_output_is_not_a_perfect_score():
    live = torch.eye(2)
    objective = make_objective(torch.zeros(1, 2), _seen(live), PRESETS["sparsegpt"].parts, has_bias=False)
    assert objective.relative_error(torch.zeros(1, 2)) == 0
    assert objective.relative_error(torch.ones(1, 2)) == float("inf")
    assert math.isnan(objective.relative_error(torch.full((1, 2), float("nan"))))


def _seen(inputs: Tensor) -> InputStatistics:
    statistics = InputStatistics(inputs.shape[1])
    statistics.add(inputs)
    return statistics


@pytest.mark.parametrize("bits", [None, 4])
def test_inputs_that_never_vary_are_left_to_the_bias(bits):
    constant = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    statistics = InputStatistics(32)
    statistics.add(constant.expand(300, 32), constant.expand(300, 32))
    weight = random_weight(16, 32)
    result = compress_linear(weight, statistics, Recipe(target_avg_bits=bits), "linear", has_bias=True)
    expected = weight.double() @ constant[0].double()
    answered = result.weight().double() @ constant[0].double() + result.bias_shift.double()
    torch.testing.assert_close(answered, expected, rtol=0, atol=1e-5)  # float32 sums of 32 terms of size 1


@pytest.mark.parametrize(
    ("own", "recipe", "message"),
    [
        ({"symmetric": True}, {"preset": "best"}, "fc1 is to have a symmetric grid, which min-max grids of whole rows"),
        ({"symmetric": True}, {"preset": "gptq", "group_size": 8}, "fc1 is to have a symmetric grid"),
        ({"symmetric": True}, {"coding": "entropy", "target_bits_per_weight": 3}, "fc1 is to have a symmetric grid"),
        (
            {"symmetric": True},
            {"preset": "gptq", "on_failure": "round"},
            "fc1 has settings .* on_failure must be 'error'",
        ),
        ({"widths": torch.full((40,), 4)}, {"preset": "gptq"}, "allocation must be 'quantile', got 'uniform'"),
    ],
)
def test_settings_of_a_linear_that_its_recipe_has_no_place_for_are_refused(own, recipe, message):
    statistics = InputStatistics(40)
    statistics.add(correlated_inputs(100, 40))
    linear = LinearToSolve(random_weight(12, 40), "fc1", **own)
    with pytest.raises(ValueError, match=message):
        compress_linears([linear], statistics, Recipe(**recipe), coded_size=lambda codes: [0.0])
