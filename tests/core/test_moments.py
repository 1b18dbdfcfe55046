"""Moments of the inputs against numpy in float64 on all tokens at once."""

import numpy as np
import pytest
import torch
from oracles import correlated_inputs, generator

import sgpt_lightning.core.moments
from sgpt_lightning.core.moments import InputStatistics, multiplies_exactly

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
        # Vectors are summed in float32 over 64 tokens, 6e-8 of their size; the matrix is summed in float32 altogether.
        tolerance = {"second_moment": 2e-6, "variance": 2e-7}.get(name, 1e-7)
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
    # 2,000 batches around 1000: a float32 running mean would be off by 1e-4 relative; here batches alone are rounded.
    inputs = 1000 + torch.rand(2000, 3, FEATURES, generator=generator())
    np.testing.assert_allclose(collect(*inputs).mean.numpy(), moments(inputs)["mean"], rtol=6e-8)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 640, 5000])
def test_vectors_are_as_exact_for_many_tokens_as_for_few(tokens):
    inputs = correlated_inputs(tokens, FEATURES) + 1
    statistics, expected = collect(inputs), moments(inputs)
    for name in ("mean", "mean_abs"):
        error = np.abs(getattr(statistics, name).numpy() - expected[name]) / expected["mean_abs"]
        assert error.max() < 2e-7, name  # of the sum of the moduli; ordered float32 sums of 5,000 would be 1e-5 off
    square = statistics.variance + statistics.mean.square()
    assert np.abs(square.numpy() / (expected["variance"] + expected["mean"] ** 2) - 1).max() < 2e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_that_are_multiplied_as_they_are_give_the_same_moments(dtype, monkeypatch):
    """On CUDA; here torch's product with a wider result is played by one in float64."""
    products = []

    def multiply(left, right, out_dtype):
        products.append((left.dtype, right.dtype, out_dtype))
        return (left.double() @ right.double()).to(out_dtype)

    monkeypatch.setattr(sgpt_lightning.core.moments, "multiplies_exactly", lambda x: x.dtype == dtype)
    monkeypatch.setattr(torch, "mm", multiply)
    inputs = (100 * correlated_inputs(200, FEATURES)).to(dtype)  # squares past float16
    statistics = InputStatistics(FEATURES)
    statistics.add(inputs[:70], inputs[:70] * 2, inputs[:70, :5])
    statistics.add(inputs[70:], inputs[70:] * 2, inputs[70:, :5].float())  # what was added to it in float32
    expected = moments(inputs.float())
    assert_same(statistics, expected)
    size = np.abs(expected["second_moment"]).max()
    for name, value in (
        ("cross_moment", 2 * expected["second_moment"]),
        ("gap_moment", expected["second_moment"][:5]),
        ("dense_mean", 2 * expected["mean"]),
        ("gap_mean", expected["mean"][:5]),
    ):
        np.testing.assert_allclose(getattr(statistics, name).numpy(), value, rtol=0, atol=2e-6 * size, err_msg=name)
    assert products == 5 * [(dtype, dtype, torch.float32)]


def test_tensor_cores_sum_few_tokens_at_a_time(monkeypatch):
    """Tensor cores round towards zero: what is left of a Hessian around a large mean would not be positive definite."""
    summed = []

    def multiply(left, right, out_dtype):
        summed.append(len(right))
        return (left.double() @ right.double()).to(out_dtype)

    monkeypatch.setattr(sgpt_lightning.core.moments, "multiplies_exactly", lambda x: True)
    monkeypatch.setattr(torch, "mm", multiply)
    inputs = correlated_inputs(2500, FEATURES).half()
    statistics = InputStatistics(FEATURES)
    statistics.add(inputs[:300])
    statistics.add(inputs[300:])
    assert sum(summed) == 2500
    assert max(summed) <= 1024
    assert_same(statistics, moments(inputs.float()))


def test_halves_on_the_cpu_are_multiplied_in_float32():
    assert not multiplies_exactly(torch.zeros(1, dtype=torch.float16))
    assert not multiplies_exactly(torch.zeros(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("row", [0, 63, 70])
def test_one_value_that_is_not_finite_is_told_for_good(value, row):
    inputs = correlated_inputs(71, FEATURES)
    statistics = collect(inputs)
    assert statistics.is_finite
    inputs[row, 5] = value
    statistics.add(inputs)
    statistics.add(torch.nan_to_num(inputs))
    assert not statistics.is_finite


def test_large_values_are_finite_though_their_squares_are_not():
    assert collect(torch.full((200, FEATURES), 1e30)).is_finite


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
