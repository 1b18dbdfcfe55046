"""Rates at one price against brute force; what is left over goes to the next; a whole model within its budget."""

import itertools

import numpy as np
import pytest
import torch

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.calibration.rates import BitBudget, RateCurve, rates_at_one_price
from sgpt_lightning.checkpoint.any_model import load_model
from sgpt_lightning.evaluation.evaluate import evaluate
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.recipe import LayerRule, Recipe
from sgpt_lightning.text.windows import calibration_windows, evaluation_windows

pytestmark = pytest.mark.usefixtures("one_thread")


def curve(weights: int, spread: float) -> RateCurve:
    """A Gaussian's: a bit an octave."""
    log_prices = np.linspace(-12, 4, 33)
    return RateCurve(log_prices, weights * np.maximum(np.log2(spread) + 2 - log_prices, 0), weights)


def test_one_price_loses_least_of_all_ways_to_deal_the_same_bits():
    curves = {"a": curve(100, 1.0), "b": curve(300, 4.0), "c": curve(50, 0.5)}
    rates = rates_at_one_price(curves, 3.0 * 450)
    assert sum(rates.values()) == pytest.approx(3.0 * 450)

    def loss(bits):
        # a code of step D adds D^2 / 12
        return sum(
            one.weights * 4.0 ** float(np.interp(-bits[name], -one.bits, one.log_prices))
            for name, one in curves.items()
        )

    chosen = loss(rates)
    steps = np.linspace(-60, 60, 13)
    for first, second in itertools.product(steps, steps):
        moved = {"a": rates["a"] + first, "b": rates["b"] + second, "c": rates["c"] - first - second}
        assert loss(moved) >= chosen * (1 - 1e-9)


def test_a_budget_that_no_price_meets_is_refused():
    with pytest.raises(ValueError, match=r"must be at least 0\.300 for this model, got 0\.200"):
        rates_at_one_price({"a": curve(100, 1.0)}, 20.0)


def test_what_a_linear_leaves_goes_to_the_next_in_proportion():
    budget = BitBudget({"q": 300.0, "k": 300.0, "fc1": 1200.0})
    assert budget.of(["q", "k"]) == [300.0, 300.0]
    budget.took({"q": 290.0, "k": 280.0})
    assert budget.of(["fc1"]) == [pytest.approx(1230.0)]
    budget.took({"fc1": 1235.0})
    assert budget.of(["q", "k"]) == [pytest.approx(297.5), pytest.approx(297.5)]
    assert "fc1" in budget
    assert "v" not in budget


@pytest.fixture(scope="module")
def windows(two_blocks):
    tokenizer = load_tokenizer(str(two_blocks))
    drawn = calibration_windows("python-docs", tokenizer, 128, 16, 0).ids
    return [{"input_ids": ids} for ids in drawn.split(8)], evaluation_windows("python-docs", tokenizer, 128, 24).ids


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_a_model_meets_its_budget_from_below_and_loses_less_than_with_fixed_widths(two_blocks, windows, scope):
    batches, held_out = windows
    perplexity = {}
    recipes = {
        "entropy": Recipe(coding="entropy", target_bits_per_weight=3.06, scope=scope),
        "fixed": Recipe(target_bits_per_weight=3.06, allocation="uniform", sparsity=0),
    }
    for name, recipe in recipes.items():
        model = load_model(str(two_blocks))
        solved = compress(model, batches, recipe, storage_dtype=torch.float16)
        weights = sum(linear.report.weights for linear in solved.values())
        bits = 8 * sum(linear.packed.nbytes for linear in solved.values()) / weights
        assert bits <= 3.06
        if name == "entropy":
            assert bits > 3.06 * 0.998
            rates = [linear.report.bits_per_weight for linear in solved.values()]
            assert (max(rates) - min(rates) > 0.5) == (scope == "model")
            assert all(linear.report.layout == "coded" for linear in solved.values())
            assert all(0 < linear.report.sparsity < 1 for linear in solved.values())
        perplexity[name] = evaluate(model, held_out, 8)
    assert perplexity["entropy"] < perplexity["fixed"]


def test_linears_that_a_rule_leaves_unquantized_stay_dense(two_blocks, windows):
    batches, _ = windows
    recipe = Recipe(coding="entropy", target_bits_per_weight=4, rules=[LayerRule("*.fc2", quantize=False)])
    solved = compress(load_model(str(two_blocks)), batches, recipe, storage_dtype=torch.float16)
    assert solved
    assert not [name for name in solved if name.endswith("fc2")]


def test_a_rule_gives_its_linears_bits_of_their_own_and_the_model_shares_the_rest(two_blocks, windows):
    batches, _ = windows
    recipe = Recipe(
        coding="entropy", target_bits_per_weight=3.0, rules=[LayerRule("*.out_proj", target_bits_per_weight=5.0)]
    )
    solved = compress(load_model(str(two_blocks)), batches, recipe, storage_dtype=torch.float16)
    ruled = {name: linear.report for name, linear in solved.items() if name.endswith("out_proj")}
    others = [linear.report for name, linear in solved.items() if name not in ruled]
    assert len(ruled) == 2
    for report in ruled.values():
        assert report.bits_per_weight == pytest.approx(5.0, rel=0.01)  # and what was left over before it
    rates = [report.bits_per_weight for report in others]
    assert max(rates) - min(rates) > 0.5
    shared = sum(8 * report.bytes for report in others) / sum(report.weights for report in others)
    assert shared == pytest.approx(3.0, rel=0.002)
    total = sum(8 * linear.report.bytes for linear in solved.values())
    assert total <= sum((5.0 if name in ruled else 3.0) * linear.report.weights for name, linear in solved.items())


def test_a_budget_below_what_the_model_takes_is_refused_before_a_block_is_solved(two_blocks, windows):
    batches, _ = windows
    model = load_model(str(two_blocks))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="target_bits_per_weight must be at least"):
        compress(model, batches, Recipe(coding="entropy", target_bits_per_weight=0.1), storage_dtype=torch.float16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
