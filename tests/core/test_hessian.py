"""The inverse factor against the textbook route in float64, and what happens when there is none."""

import pytest
import torch
from oracles import correlated_inputs, damped, second_moment, textbook_factor

from sgpt_lightning.core.hessian import HessianError, inverse_factor


def hessian_of(features: int, tokens: int = 400, seed: int = 0) -> torch.Tensor:
    return second_moment(correlated_inputs(tokens, features, seed)).float()


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("features", [1, 2, 7, 64, 130, 530])  # 530: inverted in four parts
@pytest.mark.parametrize("damp", [0.001, 0.01, 0.1])
def test_factor_is_that_of_the_textbook(features, damp):
    hessian = hessian_of(features, max(400, 3 * features))
    result = inverse_factor(hessian, damp)
    assert result.status == "ok"
    assert result.damp_percent == damp
    assert result.hinv_chol.dtype == torch.float32
    assert torch.equal(result.hinv_chol, result.hinv_chol.triu())
    # float32 Cholesky of a matrix with a condition number up to 1e3: a few hundred eps of 1.2e-7
    assert relative(result.hinv_chol, textbook_factor(damped(hessian, damp))) < 3e-5


def test_factor_squared_is_the_inverse_and_so_is_its_diagonal():
    hessian = hessian_of(40)
    result = inverse_factor(hessian, 0.01)
    inverse = torch.linalg.inv(damped(hessian, 0.01))
    u = result.hinv_chol.double()
    assert relative(u.T @ u, inverse) < 3e-5  # float32, condition number about 1e3
    assert relative(result.inverse_diagonal, inverse.diagonal()) < 3e-5


def test_dead_inputs_are_flagged_and_leave_the_others_alone():
    inputs = correlated_inputs(300, 20)
    dead = torch.zeros(20, dtype=torch.bool)
    dead[[0, 7, 19]] = True
    inputs[:, dead] = 0
    result = inverse_factor(second_moment(inputs).float(), 0.01)
    assert torch.equal(result.dead, dead)
    assert torch.isfinite(result.hinv_chol).all()
    alone = textbook_factor(damped(second_moment(inputs[:, ~dead])))
    assert relative(result.hinv_chol[~dead][:, ~dead], alone) < 3e-5  # float32
    assert not result.hinv_chol[~dead][:, dead].any()
    assert not result.hinv_chol[dead][:, ~dead].any()


def test_inputs_that_are_all_dead_still_give_a_finite_factor():
    result = inverse_factor(torch.zeros(5, 5), 0.01)
    assert result.dead.all()
    assert torch.isfinite(result.hinv_chol).all()


@pytest.mark.parametrize(("tokens", "features"), [(1, 8), (5, 64), (63, 64)])
def test_rank_deficient_hessians_succeed_and_are_not_the_identity(tokens, features):
    hessian = hessian_of(features, tokens)
    result = inverse_factor(hessian, 0.01)
    u = result.hinv_chol.double()
    oracle = torch.linalg.inv(damped(hessian, result.damp_percent))
    assert relative(u.T @ u, oracle) < 1e-3  # condition number up to 100 * features
    off_diagonal = u - u.diagonal().diag()
    assert off_diagonal.norm() > 0.05 * u.norm()


@pytest.mark.parametrize(("correlation", "expected"), [(1.005, 0.01), (1.05, 0.1), (1.5, 1.0)])
def test_damping_is_escalated_by_tens_and_the_status_says_so(correlation, expected):
    # [[1, c], [c, 1]] has the eigenvalue 1 - c, so any damping above c - 1 (mean diagonal 1) makes it definite.
    hessian = torch.tensor([[1, correlation], [correlation, 1]])
    result = inverse_factor(hessian, 0.01)
    assert result.damp_percent == pytest.approx(expected, rel=1e-12)
    assert result.status == ("ok" if expected == 0.01 else "damped")
    u = result.hinv_chol.double()
    assert relative(u.T @ u, torch.linalg.inv(damped(hessian, expected))) < 1e-4  # float32, condition up to 1e3


def test_float64_is_used_where_float32_overflows_and_the_status_says_so():
    # 3.3e38 * 1.1 is above the largest float32, 3.4e38, at every damping.
    hessian = torch.tensor([[3.3e38, 1e38], [1e38, 3.3e38]])
    result = inverse_factor(hessian, 0.1)
    assert result.status == "float64"
    assert result.damp_percent == 0.1
    u = result.hinv_chol.double() * 1e19
    assert relative(u.T @ u, torch.linalg.inv(damped(hessian / 1e38, 0.1))) < 1e-5  # the result is float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_hessian_with_nan_or_inf_is_refused_by_name(bad):
    hessian = hessian_of(6)
    hessian[2, 3] = bad
    with pytest.raises(HessianError, match=r"layers\.3\.fc1 holds NaN or inf"):
        inverse_factor(hessian, 0.01, "layers.3.fc1")


def test_an_indefinite_hessian_is_refused_by_name_and_never_replaced():
    with pytest.raises(HessianError, match=r"layers\.3\.fc1 is not positive definite.* 100% damping"):
        inverse_factor(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), 0.01, "layers.3.fc1")


@pytest.mark.parametrize("dead", [False, True])
def test_the_matrix_is_not_changed(dead):
    hessian = hessian_of(9)
    if dead:
        hessian[4] = hessian[:, 4] = 0
    before = hessian.clone()
    inverse_factor(hessian, 0.01)
    assert torch.equal(hessian, before)
