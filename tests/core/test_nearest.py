"""Plain rounding against numpy, and against what the solve would have stored."""

import numpy as np
import pytest
import torch
from oracles import random_weight

from sgpt_lightning.core.nearest import round_plainly
from sgpt_lightning.core.solution import SolveError
from sgpt_lightning.format.entropy import coded_size
from sgpt_lightning.format.packing import pack_weight
from sgpt_lightning.recipe import Recipe

WEIGHT = random_weight(12, 32)


def smallest(magnitudes: np.ndarray, count: int) -> np.ndarray:
    """Mark the smallest entries, ties by position."""
    marked = np.zeros(magnitudes.size, dtype=bool)
    marked[np.argsort(magnitudes.ravel(), kind="stable")[:count]] = True
    return marked.reshape(magnitudes.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_without_a_mask_and_with_plain_ranges_it_is_round_to_nearest(bits):
    result = round_plainly(WEIGHT, Recipe(preset="gptq", target_avg_bits=bits))
    weight = WEIGHT.double().numpy()
    low, high = np.minimum(weight.min(1, keepdims=True), 0), np.maximum(weight.max(1, keepdims=True), 0)
    span = (high - low).astype(np.float16).astype(float)  # as it is stored
    step, zero = span / (2**bits - 1), np.round(-low / span * (2**bits - 1))
    codes = np.clip(np.round(weight / step) + zero, 0, 2**bits - 1)
    assert np.array_equal(result.solution.codes.numpy(), codes)
    # float32 against float64
    np.testing.assert_allclose(result.weight().numpy(), (codes - zero) * step, rtol=1e-5, atol=1e-6)
    assert (result.status, result.relative_error, result.damp_percent) == ("rounded", None, 0.0)


@pytest.mark.parametrize("settings", [{"sparsity": 0.3}, {"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
@pytest.mark.parametrize("bits", [None, 4.0])
def test_the_smallest_weights_go_exactly_as_many_as_asked(settings, bits):
    weight = WEIGHT.clone()
    weight[:, 5] = weight[:, 6] = 0.25  # ties
    result = round_plainly(weight, Recipe(target_avg_bits=bits, **settings), torch.float32)
    magnitudes = weight.abs().numpy()
    if "pattern" in settings:
        groups = magnitudes.reshape(-1, 4)
        expected = np.stack([smallest(group, 2) for group in groups]).reshape(magnitudes.shape)
    else:
        expected = smallest(magnitudes, round(settings["sparsity"] * weight.numel()))
    assert np.array_equal(~result.solution.keep.numpy(), expected)
    assert not result.weight()[torch.from_numpy(expected)].any()
    if bits is None:
        assert torch.equal(result.weight()[result.solution.keep], weight[result.solution.keep])


@pytest.mark.parametrize(
    ("settings", "widths"),
    [
        ({"target_avg_bits": 3.5}, {3}),
        ({"target_avg_bits": 8.0}, {8}),
        ({"target_bits_per_weight": 6.2}, {8}),
        ({"sparsity": 0.0, "target_bits_per_weight": 5.5}, {4}),
    ],
    ids=str,
)
def test_the_width_is_the_widest_that_the_budget_allows(settings, widths):
    recipe = Recipe(**settings)
    result = round_plainly(WEIGHT, recipe)
    assert set(result.solution.widths.tolist()) == widths
    if recipe.target_bits_per_weight is not None:
        assert 8 * pack_weight(result.solution).nbytes <= recipe.target_bits_per_weight * WEIGHT.numel()


@pytest.mark.parametrize("bits", [None, 2600.0])
def test_whole_codes_are_the_nearest_ones_on_one_step_within_the_bits(bits):
    recipe = Recipe(coding="entropy", target_bits_per_weight=8.0)
    result = round_plainly(WEIGHT, recipe, bits=bits, coded_size=coded_size)
    step = result.solution.level.double()
    assert torch.equal(result.solution.codes.double(), (WEIGHT.double() / step).round())
    allowed = bits or 8.0 * WEIGHT.numel()
    assert 0.9 * allowed < 8 * pack_weight(result.solution).nbytes <= allowed  # a small matrix, whose tables are coarse


def test_what_cannot_be_stored_this_way_either_is_refused_by_name():
    with pytest.raises(SolveError, match=r"fc1 holds weights, up to 1e\+06, that overflow"):
        round_plainly(torch.full((2, 4), 1e6), Recipe(sparsity=0.5, target_avg_bits=None), torch.float16, name="fc1")
    recipe = Recipe(coding="entropy", target_bits_per_weight=3.0)
    with pytest.raises(SolveError, match="fc1 does not fit into 0"):
        round_plainly(WEIGHT, recipe, bits=100.0, coded_size=coded_size, name="fc1")
