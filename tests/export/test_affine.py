"""Whole numbers times a scale against what the package's own reader makes of the packed form, and float32 in numpy."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from torch import nn

from sgpt_lightning.core.grids import Grid, fit_affine_grid, quantize_matrix
from sgpt_lightning.core.solution import Pruned, Quantized
from sgpt_lightning.export.affine import NotAffineError, affine_form
from sgpt_lightning.export.pack_quantized import pack_linears
from sgpt_lightning.format.packing import pack_weight, unpack_weight

SHAPE = (13, 40)


def matrix(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def quantized(bits: int, group_size: int | None = None, kind: str = "zero-point"):
    grid, widths = fit_affine_grid(matrix(), bits, group_size), torch.full((SHAPE[1],), bits, dtype=torch.uint8)
    codes = quantize_matrix(matrix(), widths, grid)
    if kind != "zero-point":
        grid = Grid(kind, grid.span, grid.span / 3, bits, group_size)
    return pack_weight(Quantized(codes, widths, grid))


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_zero_point_grid_of_any_width_is_whole_numbers_times_its_step(bits, group_size):
    packed = quantized(bits, group_size)
    form = affine_form(packed, unpack_weight(packed))
    span = packed.tensors["weight_range"].float().numpy()
    assert np.array_equal(form.scale.numpy(), span / np.float32(2**bits - 1))
    scales = np.repeat(form.scale.numpy(), SHAPE[1] // form.scale.shape[1], 1)
    assert np.array_equal(form.differences.numpy().astype(np.float32) * scales, unpack_weight(packed).numpy())
    assert torch.equal(form.weight(), unpack_weight(packed))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_the_packages_reader_gets_the_codes_and_zeros_back(bits):
    packed, linear = quantized(bits, 8), nn.Linear(SHAPE[1], SHAPE[0])
    linear.weight.data = unpack_weight(packed)
    packing = pack_linears({"block.fc1": linear}, {"block.fc1": packed})
    scheme, tensors = packing.schemes["block.fc1"], packing.tensors
    assert scheme.bits == (4 if bits <= 4 else 8)
    assert scheme.group_size == 8
    codes = unpack_from_int32(tensors["block.fc1.weight_packed"], scheme.bits, SHAPE).float()
    zeros = torch.zeros(SHAPE[0], 5)
    if not scheme.symmetric:
        stored = tensors["block.fc1.weight_zero_point"]
        zeros = unpack_from_int32(stored, scheme.bits, (SHAPE[0], 5), packed_dim=0).float()
    scales = tensors["block.fc1.weight_scale"].repeat_interleave(8, 1)
    assert torch.equal((codes - zeros.repeat_interleave(8, 1)) * scales, linear.weight)
    assert tensors["block.fc1.weight_shape"].tolist() == list(SHAPE)


def test_linears_that_are_read_as_one_get_the_widest_width_among_them():
    names = {"a.q_proj": 3, "a.k_proj": 6, "a.v_proj": 2, "b.q_proj": 2, "a.out_proj": 2}
    packed = {name: quantized(bits) for name, bits in names.items()}
    linears = {}
    for name, weight in packed.items():
        linears[name] = nn.Linear(SHAPE[1], SHAPE[0])
        linears[name].weight.data = unpack_weight(weight)
    schemes = pack_linears(linears, packed).schemes
    assert {name: scheme.bits for name, scheme in schemes.items()} == {
        "a.q_proj": 8, "a.k_proj": 8, "a.v_proj": 8, "b.q_proj": 4, "a.out_proj": 4,
    }  # fmt: skip
    assert all(scheme.symmetric for scheme in schemes.values())


def test_where_one_needs_zeros_of_its_own_all_have_them_in_one_width():
    linears, packed = {}, {"a.fc1": quantized(4), "a.fc2": quantized(6)}
    for name, weight in packed.items():
        linears[name] = nn.Linear(SHAPE[1], SHAPE[0])
        linears[name].weight.data = unpack_weight(weight)
    alone = pack_linears({"a.fc2": linears["a.fc2"]}, packed).schemes["a.fc2"]
    assert alone.symmetric
    both = pack_linears(linears, packed)
    assert {(scheme.bits, scheme.symmetric) for scheme in both.schemes.values()} == {(8, False)}
    assert {name for name in both.tensors if name.endswith("zero_point")} == {f"{n}.weight_zero_point" for n in linears}


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        (quantized(3, kind="offset"), "grid is `offset`"),
        (quantized(3, kind="zero-free"), "grid is `zero-free`"),
        (pack_weight(Pruned(matrix())), "pruned and not quantized"),
        (quantized(3, 12), "groups of 12 do not divide its 40 inputs"),
    ],
)
def test_what_is_no_whole_number_times_a_scale_is_refused_by_name(packed, reason):
    with pytest.raises(NotAffineError, match=reason):
        affine_form(packed, unpack_weight(packed))


def test_values_are_believed_not_the_specification():
    packed = quantized(3)
    weight = unpack_weight(packed)
    weight[4, 7] = torch.nextafter(weight[4, 7], torch.tensor(9.0))
    with pytest.raises(NotAffineError, match=r"some of its rows have no exact scale in float32$"):
        affine_form(packed, weight)


def test_a_dtype_in_which_the_scale_rounds_is_refused():
    packed = quantized(4)
    with pytest.raises(NotAffineError, match="have no exact scale in float16, which the dtype float32 has"):
        affine_form(packed, unpack_weight(packed).half())
