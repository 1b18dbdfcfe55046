"""Levels as tables: whole multiples of a step against a float64 loop, and matrices swept as one against each alone."""

import itertools

import pytest
import torch
from oracles import affine_grid, correlated_inputs, damped, generator, random_weight, second_moment, textbook_factor
from torch import Tensor

from sgpt_lightning.core.grids import Grid, fit_affine_grid, top_step
from sgpt_lightning.core.masks import MaskRule
from sgpt_lightning.core.ranges import search_grid
from sgpt_lightning.core.scales import ColumnScales
from sgpt_lightning.core.sweep import sweep

pytestmark = pytest.mark.usefixtures("one_thread")
COLUMNS, PARTS = 24, (5, 8, 3)
KINDS = ["zero-point", "offset", "zero-free", "integer"]


def exact_weight(rows: int, seed: int) -> Tensor:
    """Multiples of 2^-10, inputs first: with the factor and the steps below, float32 makes no rounding error at all."""
    return torch.randint(-2048, 2049, (COLUMNS, rows), generator=generator(seed)) / 1024


def exact_factor() -> Tensor:
    entries = torch.randint(-1, 2, (COLUMNS, COLUMNS), generator=generator(7)).float()
    thinned = entries * (torch.rand(COLUMNS, COLUMNS, generator=generator(8)) < 0.2)
    return thinned.triu(1) + torch.eye(COLUMNS)


def exact_scales(kind: str, rows: int, widths: Tensor) -> ColumnScales:
    """Scales whose steps are powers of two: the widths differ in how many steps of their own they have."""
    if kind == "integer":
        return ColumnScales.integer(2.0 ** -widths.float(), rows)
    segments = 1 if kind == "zero-point" else len(widths.unique())
    tops = [top_step(kind, bits) for bits in widths.unique().tolist()]
    span = torch.tensor(tops[-1:] if kind == "zero-point" else tops) / 4
    signs = torch.arange(rows)[:, None] % 2
    origin = {
        "zero-point": torch.full((rows, segments), tops[-1] // 2, dtype=torch.uint8),
        "offset": (0.25 * signs - 1).expand(rows, segments).half(),
        "zero-free": (0.25 + 0.25 * signs).expand(rows, segments).half(),
    }[kind]
    grid = Grid(kind, span.half().expand(rows, segments).clone(), origin.clone(), int(widths.max()))
    return ColumnScales(grid, widths, COLUMNS)


def widths_of(kind: str, part: int, alike: bool) -> Tensor:
    """Widths of one part; the zero-point grid takes one width, as only its widest has an exact step."""
    if kind == "zero-point":
        return torch.full((COLUMNS,), 3 if alike else 3 + part % 2, dtype=torch.uint8)
    return torch.randint(3, 5, (COLUMNS,), generator=generator(0 if alike else part)).to(torch.uint8)


MASKS = {
    "nothing": None,
    "half": MaskRule(0.5),
    "2:4": MaskRule(0, (2, 4)),
    "1:3": MaskRule(0, (1, 3)),
    "each its own": [MaskRule(0.3), MaskRule(0.0), MaskRule(0.7)],
    "given": torch.rand(COLUMNS, sum(PARTS), generator=generator(3)) < 0.4,
}


@pytest.mark.parametrize("kind", [*KINDS, None])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("block_size", [8, 128])
def test_matrices_swept_as_one_are_what_each_is_alone(kind, alike, mask, block_size):
    weights, factor = [exact_weight(rows, i) for i, rows in enumerate(PARTS)], exact_factor()
    scales = [exact_scales(kind, rows, widths_of(kind, i, alike)) for i, rows in enumerate(PARTS)] if kind else None
    quantizer = None if scales is None else ColumnScales.stacked(scales)
    together = sweep(torch.cat(weights, 1), factor, mask, quantizer, block_size, PARTS)
    ends = list(itertools.accumulate(PARTS))
    for i, (rows, end) in enumerate(zip(PARTS, ends, strict=True)):
        own = mask[:, end - rows : end] if isinstance(mask, Tensor) else mask[i] if isinstance(mask, list) else mask
        alone = sweep(weights[i], factor, own, None if scales is None else scales[i], block_size)
        assert torch.equal(together.drop[:, end - rows : end], alone.drop)
        assert torch.equal(together.weight[:, end - rows : end], alone.weight)
        if isinstance(own, MaskRule) and not own.n_m:
            assert int(alone.drop.sum()) == round(own.sparsity * COLUMNS * rows)
    if kind:
        assert not torch.equal(together.weight, torch.cat(weights, 1))


@pytest.mark.parametrize("sizes", [(16, 16), (6, 10)])
def test_groups_are_fitted_in_each_of_the_matrices_that_are_swept_as_one(sizes):
    inputs = correlated_inputs(400, 64)
    factor = textbook_factor(damped(second_moment(inputs))).float()
    weights = [random_weight(rows, 64, seed) for seed, rows in enumerate(sizes)]
    widths = [torch.tensor(pattern * 32, dtype=torch.uint8) for pattern in ([3, 3], [4, 2])]

    def scales() -> list[ColumnScales]:
        return [
            ColumnScales(fit_affine_grid(weight, int(bits.max()), 16), bits, 64, None, refit_groups=True)
            for weight, bits in zip(weights, widths, strict=True)
        ]

    apart, stacked = scales(), ColumnScales.stacked(scales())
    together = sweep(torch.cat(weights).T, factor, None, stacked, 32, sizes).weight.split(sizes, 1)
    for i, weight in enumerate(weights):
        alone = sweep(weight.T, factor, None, apart[i], 32).weight
        # Products of another shape add in another order: now and then a near tie is decided the other way.
        assert (alone - together[i]).abs().lt(1e-5).double().mean() > 0.97
        fitted, static = stacked.parts[i].grid.span.float(), scales()[i].grid.span.float()
        torch.testing.assert_close(fitted, apart[i].grid.span.float(), rtol=0.02, atol=0)
        assert not torch.allclose(fitted, static, rtol=0.02, atol=0)


def test_groups_of_rows_with_widths_of_their_own_are_fitted_on_the_way_too():
    weight = random_weight(5, 12)
    widths = torch.tensor([2, 3, 4, 2, 4], dtype=torch.uint8)
    scales = ColumnScales(fit_affine_grid(weight, 4, 4)._replace(axis="output"), widths, 12, None, refit_groups=True)
    running = random_weight(5, 12, 1) * 3
    scales.reach(4, running.T.contiguous())
    step, _ = affine_grid(running[:, 4:8], 4, torch.float16)
    expected = step[:, 0] * 15 / (2 ** widths.double() - 1)
    torch.testing.assert_close(scales.scale(5).step.double(), expected, rtol=1e-6, atol=0)  # float32
    before, _ = affine_grid(weight[:, 8:], 4, torch.float16)
    torch.testing.assert_close(
        scales.scale(8).step.double(), before[:, 0] * 15 / (2 ** widths.double() - 1), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("group_size", [4, 6, 10])
def test_groups_fitted_on_the_way_and_patterns_may_end_at_different_columns(group_size):
    weight, inputs = random_weight(16, COLUMNS), correlated_inputs(400, COLUMNS)
    factor = textbook_factor(damped(second_moment(inputs))).float()
    bits = torch.full((COLUMNS,), 8, dtype=torch.uint8)
    scales = ColumnScales(fit_affine_grid(weight, 8, group_size), bits, COLUMNS, None, refit_groups=True)
    swept = sweep(weight.T, factor, MaskRule(0, (2, 4)), scales, 8)
    assert torch.equal(swept.drop.view(-1, 4, 16).sum(1), torch.full((COLUMNS // 4, 16), 2))
    # 8 bits: the loop is the one that only prunes, but for errors of 1/255 of a range
    pruned = sweep(weight.T, factor, MaskRule(0, (2, 4)), None, 8)
    assert (swept.drop == pruned.drop).double().mean() > 0.95
    assert (swept.weight - pruned.weight)[swept.drop == pruned.drop].abs().median() < 0.002


# ----- whole multiples of a step -----


def test_whole_multiples_follow_a_float64_loop():
    weight, inputs = random_weight(12, COLUMNS), correlated_inputs(400, COLUMNS)
    factor = textbook_factor(damped(second_moment(inputs)))
    step = 0.02 * factor.diagonal()
    running, expected = weight.double().clone(), torch.empty(12, COLUMNS, dtype=torch.float64)
    for j in range(COLUMNS):
        expected[:, j] = torch.tensor([round(x) for x in (running[:, j] / step[j]).tolist()])
        error = (running[:, j] - expected[:, j] * step[j]) / factor[j, j]
        running[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    swept = sweep(weight.T, factor.float(), None, ColumnScales.integer(step.float()), 10)
    codes = (swept.weight.T.double() / step).round()
    assert (codes == expected).double().mean() > 0.98  # a near tie in float32 and what follows from it
    assert 0.05 < (expected == 0).double().mean() < 0.95


def test_a_weight_between_two_multiples_goes_to_the_even_one_however_far_out():
    step = torch.tensor([0.5, 0.25, 1.0])
    multiples = torch.tensor(
        [0.5, 1.5, 2.5, -0.5, -1.5, 3.25, 2.0**22 + 0.5, 2.0**22 + 1.5, -(2.0**22) - 0.5, 2.0**24 + 2]
    )
    scales = ColumnScales.integer(step)
    for column in range(3):
        nearest = scales.scale(column).nearest(multiples * step[column])
        assert (nearest / step[column]).tolist() == [round(x) for x in multiples.tolist()]


# ----- what is refused, and edges -----


def scales_for(widths: list[int], columns: int, kind: str = "offset", **more) -> ColumnScales:
    weight, dealt = random_weight(4, columns), torch.tensor((widths * columns)[:columns], dtype=torch.uint8)
    if kind == "zero-point":
        grid = fit_affine_grid(weight, max(widths), more.get("group_size"))
    else:
        grid = search_grid(kind, weight, torch.ones(columns), dealt, axis="input", group_size=None, search=False)
    return ColumnScales(grid, dealt, columns, None, refit_groups=more.get("refit", False))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (scales_for([3], 12, "zero-point"), "differ in kind: offset, zero-point"),
        (scales_for([3], 16), "have 12 and 16 in_features"),
        (ColumnScales.integer(torch.ones(12)), "differ in kind: offset, integer"),
    ],
)
def test_scales_that_do_not_belong_together_are_refused(other, message):
    with pytest.raises(ValueError, match=message):
        ColumnScales.stacked([scales_for([3], 12), other])


def test_groups_of_two_sizes_are_not_fitted_in_one_loop():
    scales = [scales_for([3], 12, "zero-point", group_size=size, refit=True) for size in (4, 6)]
    with pytest.raises(ValueError, match="differ in refit_size: 4, 6"):
        ColumnScales.stacked(scales)


def test_stacked_scales_have_the_grids_of_their_parts_and_none_of_their_own():
    parts = [scales_for([3], 12), scales_for([4], 12)]
    stacked = ColumnScales.stacked(parts)
    assert [part.grid for part in stacked.parts] == [part.grid for part in parts]
    with pytest.raises(ValueError, match="stacked scales have no grid"):
        stacked.grid  # noqa: B018
    with pytest.raises(ValueError, match="integer scales have no grid"):
        ColumnScales.integer(torch.ones(3)).grid  # noqa: B018


@pytest.mark.parametrize(
    ("mask", "parts", "message"),
    [
        (None, [3, 4], r"parts \[3, 4\] add up to 7, but the weight has 8"),
        ([MaskRule(0.5)], [4, 4], "2 matrices are swept as one, but there are 1 rules"),
        ([MaskRule(0.5), MaskRule(0, (2, 4))], [4, 4], "one pattern"),
    ],
)
def test_parts_and_rules_that_do_not_fit_are_refused(mask, parts, message):
    with pytest.raises(ValueError, match=message):
        sweep(torch.zeros(12, 8), torch.eye(12), mask, None, 4, parts)


@pytest.mark.parametrize("mask", [None, MaskRule(0.5), MaskRule(0, (1, 1)), torch.zeros(1, 3, dtype=torch.bool)])
def test_one_column_and_no_row_at_all_are_matrices_too(mask):
    scales = ColumnScales.integer(torch.tensor([0.5]))
    one = sweep(torch.tensor([[0.6, -1.2, 3.0]]), torch.ones(1, 1), mask, scales, 128)
    expected = torch.tensor([[0.5, -1.0, 3.0]]).masked_fill(one.drop, 0)
    assert torch.equal(one.weight, expected)
    none = sweep(torch.zeros(8, 0), torch.eye(8), None if isinstance(mask, Tensor) else mask, None, 4)
    assert none.weight.shape == none.drop.shape == (8, 0)


def test_half_precision_and_strides_change_nothing():
    weight, factor = exact_weight(6, 0).bfloat16(), exact_factor()
    scales, mask = ColumnScales.integer(torch.full((COLUMNS,), 0.25)), MaskRule(0.5)
    plain = sweep(weight.float(), factor, mask, scales, 8)
    strided = sweep(weight.T.contiguous().T, factor.T.contiguous().T, mask, scales, 8)
    assert strided.weight.dtype == torch.float32
    assert torch.equal(plain.weight, strided.weight)
    assert torch.equal(plain.drop, strided.drop)
