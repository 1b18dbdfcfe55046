"""The solver against the paper's column loop in float64; its errors below those of the simple methods."""

import pytest
import torch
from oracles import affine_grid, correlated_inputs, output_error, random_weight, round_to_grid, sparsegpt
from torch import Tensor

from sgpt_lightning.core.solution import CompressedLinear, Quantized
from sgpt_lightning.core.solver import compress_linear

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_close(result: CompressedLinear, reference, weight: Tensor, inputs: Tensor) -> None:
    """float32 against float64: rounding to a code may flip on a near-tie, which the error does not notice."""
    error, expected = (output_error(weight, q, inputs) for q in (result.weight(), reference.weight))
    assert error == pytest.approx(expected, rel=1e-3)
    same = (result.weight().double() - reference.weight).abs() < 1e-5
    assert same.double().mean() > 0.99
    if result.solution.keep is not None:
        assert (result.solution.keep == ~reference.drop).double().mean() > 0.999


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.5},
        {"sparsity": 0.3, "block_size": 20},
        {"pattern": "2:4"},
        {"pattern": "4:8"},
        {"bits": 2},
        {"bits": 3},
        {"bits": 4},
        {"bits": 8},
        {"sparsity": 0.5, "bits": 4},
        {"sparsity": 0.5, "bits": 2, "block_size": 1},
        {"pattern": "2:4", "bits": 3, "block_size": 128},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(32, 72), (25, 40)])
def test_result_is_that_of_the_papers_column_loop(collect, solve, settings, shape):
    weight, inputs = random_weight(*shape), correlated_inputs(400, shape[1])
    settings = {"block_size": 32} | settings
    bits, pattern = settings.pop("bits", None), settings.get("pattern")
    result = solve(weight, inputs, target_avg_bits=bits, **settings)
    n_m = tuple(map(int, pattern.split(":"))) if pattern else None
    shared = {key: settings[key] for key in ("sparsity", "block_size") if key in settings}
    reference = sparsegpt(weight, collect(inputs).second_moment, n_m=n_m, bits=bits, **shared)
    assert_close(result, reference, weight, inputs)


@pytest.mark.parametrize("allocation", ["quantile", "budget"])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_mixed_widths_are_the_same_loop_with_a_mask_from_a_pruning_pass(collect, solve, allocation, pattern):
    weight, inputs = random_weight(32, 64), correlated_inputs(400, 64)
    hessian = collect(inputs).second_moment
    result = solve(weight, inputs, sparsity=0.5, pattern=pattern, target_avg_bits=3.5, allocation=allocation)
    mask = sparsegpt(weight, hessian, sparsity=0.5, n_m=(2, 4) if pattern else None, block_size=32).drop
    reference = sparsegpt(weight, hessian, bits=result.solution.widths.tolist(), drop=mask)
    assert_close(result, reference, weight, inputs)


@pytest.mark.parametrize("bits", [None, 3])
def test_act_order_is_the_same_loop_on_permuted_columns(collect, solve, bits):
    weight, inputs = random_weight(32, 64), correlated_inputs(400, 64)
    hessian = collect(inputs).second_moment
    order = hessian.diagonal().argsort(descending=True)
    permuted = sparsegpt(weight[:, order], hessian[order][:, order], sparsity=0.5, bits=bits, block_size=32)
    reference = type(permuted)(*(part[:, order.argsort()] for part in permuted))
    assert_close(solve(weight, inputs, sparsity=0.5, target_avg_bits=bits, act_order=True), reference, weight, inputs)


@pytest.mark.parametrize("bits", [2, 3])  # at 4 bits the two are within 5 % of each other, either way round
@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("seed", range(3))
def test_joint_error_is_below_prune_then_quantize(collect, solve, pattern, bits, seed):
    weight, inputs = random_weight(48, 64, seed), correlated_inputs(600, 64, seed)
    hessian = collect(inputs).second_moment
    joint = solve(weight, inputs, sparsity=0.5, pattern=pattern, target_avg_bits=bits).weight()
    pruned = sparsegpt(weight, hessian, sparsity=0.5, n_m=(2, 4) if pattern else None, block_size=32)
    rounded = round_to_grid(pruned.weight, *affine_grid(pruned.weight, bits), bits)
    gptq = sparsegpt(pruned.weight, hessian, bits=bits, drop=pruned.drop).weight
    for separate in (rounded, gptq):
        assert output_error(weight, joint, inputs) < output_error(weight, separate, inputs)


@pytest.mark.parametrize("seed", range(3))
def test_error_is_below_magnitude_pruning_and_below_round_to_nearest(solve, seed):
    weight, inputs = random_weight(32, 64, seed), correlated_inputs(400, 64, seed)
    magnitude = weight * (weight.abs() > weight.abs().flatten().kthvalue(weight.numel() // 2).values)
    pruned = solve(weight, inputs, sparsity=0.5).weight()
    assert output_error(weight, pruned, inputs) < 0.7 * output_error(weight, magnitude, inputs)
    for bits in (2, 3, 4):
        nearest = round_to_grid(weight.double(), *affine_grid(weight.double(), bits), bits)
        swept = solve(weight, inputs, target_avg_bits=bits).weight()
        assert output_error(weight, swept, inputs) < 0.9 * output_error(weight, nearest, inputs)


def test_more_bits_and_fewer_zeros_give_less_error(solve):
    weight, inputs = random_weight(32, 64), correlated_inputs(400, 64)
    by_bits = [solve(weight, inputs, target_avg_bits=bits).relative_error for bits in range(1, 9)]
    by_zeros = [solve(weight, inputs, sparsity=s).relative_error for s in (0.9, 0.7, 0.5, 0.3, 0.1)]
    for errors in (by_bits, by_zeros):
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"target_avg_bits": 3}, {"pattern": "2:4"}], ids=str)
@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
def test_relative_error_is_that_of_the_stored_weights_on_the_tokens(collect, plain_recipe, settings, storage):
    weight, inputs = random_weight(20, 48), correlated_inputs(300, 48) + 0.3
    result = compress_linear(weight, collect(inputs), plain_recipe(**settings), storage_dtype=storage)
    assert isinstance(result.solution, Quantized) or result.solution.values.dtype == storage
    expected = output_error(weight, result.weight(), inputs)
    assert result.relative_error == pytest.approx(expected, rel=1e-4)  # float32 products against float64
