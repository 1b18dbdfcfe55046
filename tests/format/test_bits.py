"""Packed bits against one big Python integer and numpy.packbits."""

import numpy as np
import pytest
import torch
from oracles import generator

from sgpt_lightning.format.bits import pack_bits, packed_bytes, unpack_bits

LENGTHS = [0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 257]


def random_codes(count: int, bits: int) -> torch.Tensor:
    return torch.randint(1 << bits, (count,), generator=generator(count)).to(torch.uint8)


def oracle_bytes(codes: torch.Tensor, bits: int) -> bytes:
    """Code i takes bits [bits * i, bits * (i + 1)) of one little-endian number."""
    number = sum(code << (bits * i) for i, code in enumerate(codes.tolist()))
    return number.to_bytes(-(-len(codes) * bits // 8), "little")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", LENGTHS)
def test_bytes_are_those_of_one_little_endian_number_and_come_back(count, bits):
    codes = random_codes(count, bits)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert bytes(packed.tolist()) == oracle_bytes(codes, bits)
    assert packed.nbytes == packed_bytes(count, bits)
    unpacked = unpack_bits(packed, bits, count)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("count", LENGTHS[1:])
def test_a_mask_is_packed_as_numpy_packs_it(count):
    mask = random_codes(count, 1)
    expected = np.packbits(mask.numpy(), bitorder="little")
    np.testing.assert_array_equal(pack_bits(mask, 1).numpy(), expected)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_highest_code_survives_at_every_position_of_a_byte(bits):
    codes = torch.eye(17, dtype=torch.uint8) * ((1 << bits) - 1)
    for row in codes:
        assert torch.equal(unpack_bits(pack_bits(row, bits), bits, 17), row)


def test_three_bit_codes_cross_byte_edges_as_drawn_by_hand():
    # codes 1..8 mod 8, lowest bit first: 100 010 110 001 101 011 111 000
    #                             bytes : 10001011 00011010 11111000, read from the right: 0xD1 0x58 0x1F
    assert pack_bits(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8), 3).tolist() == [0xD1, 0x58, 0x1F]


def test_less_than_one_byte_is_wasted():
    for bits in range(1, 9):
        for count in range(200):
            assert 0 <= 8 * packed_bytes(count, bits) - count * bits < 8


def test_a_matrix_is_packed_row_by_row():
    codes = random_codes(35, 3)
    assert torch.equal(pack_bits(codes.view(5, 7), 3), pack_bits(codes, 3))
    transposed = codes.view(5, 7).T
    assert torch.equal(unpack_bits(pack_bits(transposed, 3), 3, 35), transposed.reshape(-1))


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_a_width_outside_1_to_8_is_refused_with_its_value(bits):
    with pytest.raises(ValueError, match=f"bits must be from 1 to 8, got {bits}"):
        pack_bits(torch.zeros(4, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=f"bits must be from 1 to 8, got {bits}"):
        unpack_bits(torch.zeros(4, dtype=torch.uint8), bits, 4)


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_that_does_not_fit_is_refused_with_its_value(bits):
    codes = torch.tensor([0, 1 << bits, 0], dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"below 2\^{bits}, got {1 << bits}"):
        pack_bits(codes, bits)


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_wrong_number_of_bytes_is_refused_with_both_numbers(extra):
    with pytest.raises(ValueError, match=f"11 codes of 3 bits take 5 bytes, got {5 + extra} bytes"):
        unpack_bits(torch.zeros(5 + extra, dtype=torch.uint8), 3, 11)
