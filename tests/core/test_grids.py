"""The affine grid against brute force over every code."""

import numpy as np
import pytest
import torch
from oracles import affine_grid, random_weight

from sgpt_lightning.core.grids import Grid, dequantize_matrix, fit_affine_grid

WIDTHS = range(1, 9)


def rounded(weight: torch.Tensor, grid: Grid, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = grid.at(bits)
    codes = scale.quantize(weight)
    return codes, scale.dequantize(codes)


def odd_rows() -> torch.Tensor:
    """Two-signed, positive, negative, all-zero, one-entry, constant, very lopsided and symmetric rows."""
    rows = random_weight(8, 40)
    rows[1] = rows[1].abs() + 0.01
    rows[2] = -rows[2].abs() - 0.01
    rows[3] = 0
    rows[4] = torch.eye(40)[3] * -0.2
    rows[5] = 0.07
    rows[6, 0] = 3
    rows[7] = torch.linspace(-0.1, 0.1, 40)
    return rows


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("max_bits", WIDTHS)
def test_zero_is_on_the_grid_exactly_for_every_width(bits, max_bits):
    if bits > max_bits:
        bits, max_bits = max_bits, bits
    weight = odd_rows()
    weight[:, 10:20] = 0
    codes, values = rounded(weight, fit_affine_grid(weight, max_bits), bits)
    assert torch.equal(values[:, 10:20], torch.zeros(8, 10))
    assert torch.equal(codes, codes.round())
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    assert all(len(row.unique()) <= 2**bits for row in values)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_weight_goes_to_the_nearest_code(bits):
    weight = odd_rows()
    grid = fit_affine_grid(weight, bits)
    scale, zero_point = (part.double()[:, None] for part in (grid.at(bits).step, grid.at(bits).base))
    candidates = scale * (torch.arange(2**bits, dtype=torch.float64) - zero_point)
    nearest = (weight.double()[:, :, None] - candidates).abs().amin(2)
    error = (weight - rounded(weight, grid, bits)[1]).double().abs()
    assert torch.allclose(error, nearest, rtol=0, atol=2e-6)  # float32 of weights up to 3: a tie may go either way


@pytest.mark.parametrize("bits", WIDTHS)
def test_one_width_is_the_min_max_grid(bits):
    weight = odd_rows()[[0, 1, 2, 4, 5, 6, 7]]
    _, _, scale, zero_point = fit_affine_grid(weight, bits).at(bits)
    expected_scale, expected_zero = affine_grid(weight.double(), bits, torch.float16)
    np.testing.assert_allclose(scale.double(), expected_scale, rtol=1e-6)  # one float32 division
    assert (zero_point - expected_zero.clamp(0, 2**bits - 1)).abs().max() == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_weight_is_further_than_half_a_step_away(bits):
    weight = odd_rows()
    grid = fit_affine_grid(weight, bits)
    # Half a step by rounding, half a step by rounding the zero point, and 2^-11 of the range by storing it in float16.
    limit = grid.at(bits).step + grid.span.float() * 2**-11
    assert ((weight - rounded(weight, grid, bits)[1]).abs() <= limit).all()


def test_all_zero_rows_stay_zero_and_one_signed_rows_keep_their_sign():
    weight = odd_rows()
    for bits in WIDTHS:
        values = rounded(weight, fit_affine_grid(weight, bits), bits)[1]
        assert torch.equal(values[3], torch.zeros(40))
        assert (values[1] >= 0).all()
        assert (values[2] <= 0).all()
        assert values[1].any()
        assert values[2].any()


@pytest.mark.parametrize(
    ("factor", "dtype"), [(1, torch.float16), (1e-3, torch.float16), (1e6, torch.float32), (1e-6, torch.float32)]
)
def test_ranges_are_float16_unless_they_overflow_or_underflow_it(factor, dtype):
    weight = random_weight(5, 30) * factor
    grid = fit_affine_grid(weight, 8)
    assert grid.span.dtype == dtype
    assert grid.origin.dtype == torch.uint8
    error = (weight - rounded(weight, grid, 8)[1]).norm() / weight.norm()
    assert 0 < error < 0.01  # steps of 1/255 of a range of about 4 sigma: 0.5 % rms


def test_one_range_serves_all_widths():
    grid = fit_affine_grid(random_weight(5, 30), 8)
    for bits in WIDTHS:
        _, _, scale, zero_point = grid.at(bits)
        np.testing.assert_allclose(scale * (2**bits - 1), grid.span.float(), rtol=1e-6)
        exact = grid.origin.double() * (2**bits - 1) / 255
        assert ((zero_point - exact).abs() <= 0.5).all()


def test_columns_are_dequantized_by_their_own_width():
    weight = random_weight(6, 24)
    widths = torch.tensor([2, 8, 3, 4] * 6, dtype=torch.uint8)
    grid = fit_affine_grid(weight, 8)
    codes = torch.stack([rounded(weight, grid, int(b))[0][:, j] for j, b in enumerate(widths)], 1).to(torch.uint8)
    result = dequantize_matrix(codes, widths, grid)
    for j, bits in enumerate(widths.tolist()):
        zero = np.round(grid.origin[:, 0].numpy().astype(float) * (2**bits - 1) / 255)
        expected = grid.span[:, 0].numpy().astype(float) / (2**bits - 1) * (codes[:, j].numpy() - zero)
        np.testing.assert_allclose(result[:, j], expected, rtol=1e-6)  # one float32 division and one product


@pytest.mark.parametrize("bits", WIDTHS)
def test_weights_outside_the_range_go_to_its_ends(bits):
    # The sweep feeds errors forward, so that later columns may leave the range that was fitted to the matrix.
    weight = odd_rows()
    codes, _ = rounded(weight * 100, fit_affine_grid(weight, bits), bits)
    assert codes.min() == 0
    assert codes.max() == 2**bits - 1
