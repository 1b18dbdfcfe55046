"""Moments of the inputs against numpy in float64 on all tokens at once."""

import numpy as np
import pytest
import torch
from oracles import correlated_inputs, generator

from sgpt_lightning.core.moments import InputStatistics

FEATURES = 12


def collect(*batches: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(FEATURES)
    for batch in batches:
        statistics.add(batch)
    return statistics


def moments(inputs: torch.Tensor) -> dict[str, np.ndarray]:
    x = inputs.reshape(-1, FEATURES).double().numpy()
    return {
        "second_moment": x.T @ x / len(x),
        "mean": x.mean(0),
        "mean_abs": np.abs(x).mean(0),
        "variance": x.var(0),
    }


def assert_same(statistics: InputStatistics, expected: dict[str, np.ndarray]) -> None:
    size = np.abs(expected["second_moment"]).max()
    for name, value in expected.items():
        # Squares are rounded to float32, 6e-8 of E x^2 each; the matrix is also summed in float32. Sums are float64.
        tolerance = {"second_moment": 2e-6, "variance": 2e-7}.get(name, 1e-13)
        actual = getattr(statistics, name).double().numpy()
        np.testing.assert_allclose(actual, value, rtol=1e-12, atol=tolerance * size, err_msg=name)


def test_moments_are_those_of_numpy():
    inputs = correlated_inputs(500, FEATURES) + torch.linspace(-3, 3, FEATURES)
    statistics = collect(inputs)
    assert statistics.tokens == 500
    assert_same(statistics, moments(inputs))


@pytest.mark.parametrize("shape", [(60, FEATURES), (3, 20, FEATURES), (60, 1, FEATURES), (2, 3, 10, FEATURES)])
def test_tokens_are_counted_and_not_samples(shape):
    inputs = correlated_inputs(60, FEATURES)
    statistics, flat = collect(inputs.reshape(shape)), collect(inputs)
    assert statistics.tokens == 60
    for name in moments(inputs):
        assert torch.equal(getattr(statistics, name), getattr(flat, name)), name


@pytest.mark.parametrize("sizes", [(1,) * 97, (96, 1), (1, 96), (50, 47), (30, 0, 67)])
def test_batches_of_any_size_add_up_to_one_pass(sizes):
    inputs = correlated_inputs(97, FEATURES) + 1
    statistics = collect(*inputs.split(sizes))
    assert statistics.tokens == 97
    assert_same(statistics, moments(inputs))


@pytest.mark.parametrize("cut", [0, 1, 48, 96, 97])
def test_merging_equals_having_seen_everything(cut):
    inputs = correlated_inputs(97, FEATURES) + 1
    left, right = collect(inputs[:cut]), collect(inputs[cut:])
    left.merge(right)
    assert left.tokens == 97
    assert_same(left, moments(inputs))
    assert right.tokens == 97 - cut
    if cut < 97:
        assert_same(right, moments(inputs[cut:]))


def test_merging_two_that_saw_nothing_gives_nothing():
    statistics = collect()
    statistics.merge(collect())
    assert statistics.tokens == 0
    assert not statistics.second_moment.any()


def test_the_mean_of_many_batches_does_not_drift():
    # 2,000 batches around 1000: a float32 running mean would be off by 1e-4 relative, a float64 sum is not.
    inputs = 1000 + torch.rand(2000, 3, FEATURES, generator=generator())
    np.testing.assert_allclose(collect(*inputs).mean.numpy(), moments(inputs)["mean"], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_any_dtype_are_taken_at_their_value(dtype):
    inputs = correlated_inputs(200, FEATURES).to(dtype)
    assert_same(collect(inputs), moments(inputs.float()))


def test_half_precision_inputs_do_not_overflow():
    inputs = torch.full((4, FEATURES), 60000.0, dtype=torch.float16)
    assert_same(collect(inputs), moments(inputs.float()))


def test_constant_inputs_have_no_negative_variance():
    statistics = collect(torch.full((7, FEATURES), 0.1))
    assert (statistics.variance >= 0).all()
    assert (statistics.variance < 1e-8).all()


def test_the_inputs_are_not_changed_and_carry_no_graph():
    inputs = correlated_inputs(20, FEATURES).requires_grad_()
    before = inputs.detach().clone()
    statistics = collect(inputs)
    assert torch.equal(inputs.detach(), before)
    assert not statistics.second_moment.requires_grad


def test_a_wrong_number_of_features_is_refused_with_the_shape():
    with pytest.raises(ValueError, match=r"12 features.*\(5, 11\)"):
        collect(torch.zeros(5, FEATURES - 1))
