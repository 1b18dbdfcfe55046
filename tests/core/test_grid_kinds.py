"""The three kinds of grid: nearest levels by brute force, codes that come back, values by numpy in float32."""

import numpy as np
import pytest
import torch
from oracles import generator, levels, random_weight
from torch import Tensor

from sgpt_lightning.core.grids import Grid, GridKind, dequantize_matrix, quantize_matrix

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = pytest.mark.parametrize("kind", ["zero-point", "offset", "zero-free"])
AXES = pytest.mark.parametrize("axis", ["input", "output"])
GROUPS = pytest.mark.parametrize("group_size", [None, 7])
ROWS, COLUMNS = 8, 24
MIXED = [1, 2, 3, 4, 5, 6, 7, 8]


def widths_of(axis: str, widths: list[int]) -> Tensor:
    count = COLUMNS if axis == "input" else ROWS
    return torch.tensor((widths * COLUMNS)[:count], dtype=torch.uint8)


def some_grid(
    kind: GridKind, widths: Tensor, axis: str = "input", group_size: int | None = None, seed: int = 0
) -> Grid:
    """Random spans, and origins on either side of zero where the kind has such."""
    g = generator(seed)
    if group_size:
        segments = -(-COLUMNS // group_size)
    else:
        segments = len(widths.unique()) if axis == "input" and kind != "zero-point" else 1
    span = (torch.rand(ROWS, segments, generator=g) * 0.2 + 0.02).half()
    low = {"offset": -0.15, "zero-free": 0.002, "zero-point": 0}[kind]
    origin = (torch.rand(ROWS, segments, generator=g) * 0.1 + low).half()
    top = int(widths.max())
    if kind == "zero-point":
        origin = torch.randint(2**top, (ROWS, segments), generator=g).to(torch.uint8)
    return Grid(kind, span, origin, top, group_size, axis)


def random_codes(widths: Tensor, axis: str, seed: int = 0) -> Tensor:
    per = widths.double() if axis == "input" else widths.double()[:, None]
    return (torch.rand(ROWS, COLUMNS, generator=generator(seed), dtype=torch.float64) * 2**per).to(torch.uint8)


def segment(grid: Grid, widths: Tensor, column: int) -> int:
    if grid.group_size:
        return column // grid.group_size
    if grid.kind == "zero-point" or grid.axis == "output":
        return 0
    return sorted(set(widths.tolist())).index(int(widths[column]))


def table(grid: Grid, widths: Tensor, row: int, column: int) -> list[float]:
    """All values that one entry can have."""
    index = segment(grid, widths, column)
    bits = int(widths[row if grid.axis == "output" else column])
    return levels(grid.kind, bits, float(grid.span[row, index]), float(grid.origin[row, index]), grid.max_bits)


@KINDS
@pytest.mark.parametrize("bits", range(1, 9))
def test_nearest_is_what_the_code_of_the_nearest_stands_for_bit_for_bit(kind, bits):
    weight = random_weight(ROWS, 500)
    weight[:, :3] = torch.tensor([0.0, 1.0, -1.0])
    scale = some_grid(kind, torch.tensor([bits])).at(bits)
    before = weight.clone()
    nearest, read = scale.nearest(weight), scale.dequantize(scale.quantize(weight))
    assert torch.equal(weight, before)
    assert torch.equal(nearest, read)
    if kind == "zero-free":  # no zeros there, so the sign of zero is no matter
        assert torch.equal(nearest.view(torch.int32), read.view(torch.int32))


@KINDS
def test_a_negative_zero_is_rounded_as_its_code_says(kind):
    scale, zero = some_grid(kind, torch.tensor([3])).at(3), torch.full((ROWS, 1), -0.0)
    assert torch.equal(scale.nearest(zero), scale.dequantize(scale.quantize(zero)))


@KINDS
def test_nearest_is_what_the_code_of_the_nearest_stands_for_where_rows_have_widths(kind):
    weight, widths = random_weight(ROWS, 500), widths_of("output", MIXED)
    scale = some_grid(kind, widths, "output").at_rows(widths)
    assert torch.equal(scale.nearest(weight), scale.dequantize(scale.quantize(weight)))


@KINDS
@AXES
@GROUPS
@pytest.mark.parametrize("widths", [[3], [2, 4, 8], MIXED], ids=str)
def test_every_weight_goes_to_the_nearest_of_its_levels(kind, axis, group_size, widths):
    weight, widths = random_weight(ROWS, COLUMNS), widths_of(axis, widths)
    grid = some_grid(kind, widths, axis, group_size)
    codes = quantize_matrix(weight, widths, grid)
    values = dequantize_matrix(codes, widths, grid)
    for row in range(ROWS):
        for column in range(COLUMNS):
            choices = table(grid, widths, row, column)
            wanted = float(weight[row, column])
            least = min(abs(choice - wanted) for choice in choices)
            # 1e-7: float32 of values around 0.2; a tie may go either way
            assert abs(float(values[row, column]) - wanted) == pytest.approx(least, abs=1e-7)
            assert float(values[row, column]) == pytest.approx(choices[int(codes[row, column])], abs=1e-7)


@KINDS
@AXES
@GROUPS
@pytest.mark.parametrize("widths", [[1], [4], [8], [2, 3, 6], MIXED], ids=str)
def test_codes_come_back_from_the_values_they_stand_for(kind, axis, group_size, widths):
    widths = widths_of(axis, widths)
    for seed in range(3):
        grid = some_grid(kind, widths, axis, group_size, seed)
        codes = random_codes(widths, axis, seed)
        values = dequantize_matrix(codes, widths, grid)
        assert codes.dtype == torch.uint8
        assert values.dtype == torch.float32
        assert torch.equal(quantize_matrix(values, widths, grid), codes)


@KINDS
@AXES
@GROUPS
@pytest.mark.parametrize("widths", [[5], MIXED], ids=str)
def test_a_value_is_that_of_the_formula_in_float32(kind, axis, group_size, widths):
    widths = widths_of(axis, widths)
    grid = some_grid(kind, widths, axis, group_size)
    codes = random_codes(widths, axis)
    values = dequantize_matrix(codes, widths, grid).numpy()
    for row in range(ROWS):
        for column in range(COLUMNS):
            index, code = segment(grid, widths, column), np.float32(int(codes[row, column]))
            bits = int(widths[row if axis == "output" else column])
            span, origin = (np.float32(part[row, index].item()) for part in (grid.span, grid.origin))
            if kind == "zero-point":
                zero = np.round(origin * np.float32((2**bits - 1) / (2**grid.max_bits - 1)))
                expected = span / np.float32(2**bits - 1) * (code - zero)
            elif kind == "offset":
                expected = origin + span / np.float32(2**bits - 1) * code
            else:
                half = np.float32(2 ** (bits - 1))
                size = origin + span / max(half - 1, np.float32(1)) * (code % half)
                expected = -size if code >= half else size
            assert values[row, column] == expected  # not a bit of difference: a file must read alike everywhere


@pytest.mark.parametrize("bits", range(1, 9))
def test_zero_free_never_yields_zero_and_no_more_values_than_codes(bits):
    weight = random_weight(ROWS, 2000)
    weight[:, ::50] = 0
    widths = torch.full((2000,), bits, dtype=torch.uint8)
    grid = some_grid("zero-free", widths)
    codes = quantize_matrix(weight, widths, grid)
    values = dequantize_matrix(codes, widths, grid)
    assert values.all()
    assert int(codes.max()) == 2**bits - 1
    assert all(2 <= len(row.unique()) <= 2**bits for row in values)
    assert torch.equal(values[weight != 0].sign(), weight[weight != 0].sign())


@KINDS
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_stay_within_their_width_however_large_the_weights(kind, bits):
    widths = torch.full((COLUMNS,), bits, dtype=torch.uint8)
    for factor in (1, 1e3, 1e-6):
        codes = quantize_matrix(random_weight(ROWS, COLUMNS) * factor, widths, some_grid(kind, widths))
        assert int(codes.max()) < 2**bits
    wild = quantize_matrix(random_weight(ROWS, COLUMNS).sign() * 1e3, widths, some_grid(kind, widths))
    ends = {0, 2**bits - 1}
    if kind == "zero-free":
        ends = {2 ** (bits - 1) - 1, 2**bits - 1}
    assert set(wild.flatten().tolist()) == ends
