"""Rounding of tables, against numpy and the definition of the budget."""

import math

import numpy as np
import pytest
import torch
from oracles import generator

from sgpt_lightning.core.rate import least_coded_bits
from sgpt_lightning.core.solution import SolveError
from sgpt_lightning.core.tables import round_table
from sgpt_lightning.format.entropy import coded_size
from sgpt_lightning.format.packing import pack_weight

WEIGHT = torch.randn(300, 48, generator=generator(0)) * 0.07


@pytest.mark.parametrize("bits", [0.7, 2.0, 5.0, 8.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_bytes_written_meet_the_bits_from_below(bits, weighted):
    weights = torch.randint(1, 500, (300,), generator=generator(1)) if weighted else None
    packed = pack_weight(round_table(WEIGHT, bits * WEIGHT.numel(), coded_size, weights))
    assert bits * 0.996 <= 8 * packed.nbytes / WEIGHT.numel() <= bits


def test_codes_are_the_nearest_multiples_of_one_step():
    solution = round_table(WEIGHT, 4.0 * WEIGHT.numel(), coded_size)
    step = float(solution.level)
    assert np.array_equal(solution.codes.numpy(), np.round(WEIGHT.numpy() / np.float32(step)))
    assert (int(solution.steps.max()), int(solution.rows.max())) == (0, 0)
    # A Gaussian takes its differential entropy less log2 of the step.
    side = 8 * (4 + 300 + 48) / WEIGHT.numel()
    assert math.log2(math.sqrt(2 * math.pi * math.e) * 0.07 / step) + side == pytest.approx(
        4.0, abs=0.2
    )  # tables of the coder


def test_a_row_that_counts_four_times_as_much_has_half_the_step():
    weights = torch.ones(300)
    weights[7] = 4
    solution = round_table(WEIGHT, 4.0 * WEIGHT.numel(), coded_size, weights)
    steps = solution.level * 2.0 ** (-solution.rows.double() / 8)
    assert float(steps[7] / steps[0]) == pytest.approx(0.5)
    error = (solution.weight() - WEIGHT).abs().amax(1)
    assert bool((error <= steps / 2 * (1 + 1e-5)).all())


def test_the_weighted_error_is_below_that_of_rows_alike_at_the_same_bytes():
    weights = torch.logspace(0, 4, 300)

    def loss(row_weights):
        solution = round_table(WEIGHT, 4.0 * WEIGHT.numel(), coded_size, row_weights)
        return float((weights[:, None] * (solution.weight() - WEIGHT).square()).sum())

    assert loss(weights) < 0.5 * loss(None)


def test_all_zeros_and_sixteen_bits_are_tables_too():
    assert not round_table(torch.zeros(20, 8), 5.0 * 160, coded_size).weight().any()
    half = round_table(WEIGHT.half(), 5.0 * WEIGHT.numel(), coded_size).weight()
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, WEIGHT, rtol=0, atol=0.02)  # half a step at 5 bits is 0.005


def test_what_does_not_fit_and_what_is_no_number_is_refused_by_name():
    least = least_coded_bits(WEIGHT, coded_size)
    assert least >= 8 * (300 + 48 + 4)
    with pytest.raises(SolveError, match=r"wte does not fit into 0\.\d+ bits a weight"):
        round_table(WEIGHT, least - 8, coded_size, name="wte")
    with pytest.raises(SolveError, match="wte holds NaN or inf"):
        round_table(WEIGHT.clone().fill_(math.inf), 5.0 * WEIGHT.numel(), coded_size, name="wte")
