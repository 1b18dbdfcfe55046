"""Survivors fitted by conjugate gradients against the direct solve of each row in float64."""

import pytest
import torch
from oracles import correlated_inputs, damped, generator, random_weight, restricted_solve, row_errors, second_moment

from sgpt_lightning.core.refit import fit_survivors

pytestmark = pytest.mark.usefixtures("one_thread")


def case(seed: int, rows: int = 12, columns: int = 24, tokens: int = 200):
    """A target, its damped Hessian, and a mask that spares some rows, empties one and keeps one whole."""
    target = random_weight(rows, columns, seed)
    hessian = damped(second_moment(correlated_inputs(tokens, columns, seed))).float()
    g = generator(seed)
    drop = torch.rand(rows, columns, generator=g) < torch.rand(rows, 1, generator=g)
    drop[0], drop[1] = True, False
    return target, hessian, drop


@pytest.mark.parametrize("tokens", [10, 200])
@pytest.mark.parametrize("seed", range(4))
def test_enough_steps_give_the_direct_solve_of_every_row(seed, tokens):
    target, hessian, drop = case(seed, tokens=tokens)
    fitted = fit_survivors(target, hessian, drop, steps=80)
    expected = restricted_solve(target, hessian, drop)
    # float32 residuals of a system with a condition number of up to 1e4
    assert (fitted.double() - expected).norm() < 1e-3 * expected.norm()
    least, first = row_errors(expected, target, hessian), row_errors(target.masked_fill(drop, 0), target, hessian)
    # 1e-5 of what there was to gain: errors are flat around their minimum
    assert (row_errors(fitted, target, hessian) <= least + 1e-5 * (first - least) + 1e-12).all()
    assert (first - least)[2:].sum() > 0.1 * first[2:].sum()


@pytest.mark.parametrize("seed", range(4))
def test_twenty_steps_leave_a_thousandth_of_the_gain(seed):
    target, hessian, drop = case(seed, 16, 96, 400)
    fitted, expected = fit_survivors(target, hessian, drop, steps=20), restricted_solve(target, hessian, drop)
    errors = [float(row_errors(w, target, hessian).sum()) for w in (target.masked_fill(drop, 0), fitted, expected)]
    assert errors[1] - errors[2] < 1e-3 * (errors[0] - errors[2])


@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_never_above_the_first_guess_and_falls_with_every_step(seed):
    target, hessian, drop = case(seed)
    first = row_errors(target.masked_fill(drop, 0), target, hessian)
    before = first
    for steps in range(40):
        after = row_errors(fit_survivors(target, hessian, drop, steps), target, hessian)
        assert (after <= before + 1e-6 * first + 1e-15).all()  # float32: a step at the minimum moves by rounding
        before = after


@pytest.mark.parametrize("steps", [0, 1, 5, 300])
def test_removed_entries_are_exactly_zero_and_whole_rows_are_left_as_they_are(steps):
    target, hessian, drop = case(0)
    fitted = fit_survivors(target, hessian, drop, steps)
    assert torch.isfinite(fitted).all()  # 300: long after there is nothing left to gain
    assert not fitted[drop].any()
    assert torch.equal(fitted[1], target[1])
    if steps == 0:
        assert torch.equal(fitted, target.masked_fill(drop, 0))


def test_rows_do_not_see_each_other_and_arguments_stay():
    target, hessian, drop = case(0)
    before = target.clone(), hessian.clone(), drop.clone()
    fitted = fit_survivors(target, hessian, drop, 7)
    for row in range(len(target)):
        alone = fit_survivors(target[row : row + 1], hessian, drop[row : row + 1], 7)
        assert (fitted[row] - alone[0]).abs().max() < 1e-5 * target.abs().max()  # products of another shape, float32
    assert all(torch.equal(a, b) for a, b in zip(before, (target, hessian, drop), strict=True))
