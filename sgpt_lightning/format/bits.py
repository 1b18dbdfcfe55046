"""b-bit codes to bytes and back, exactly, with less than one byte of padding.

Eight codes of b bits fill b bytes, whatever b is. Code i of a group of eight takes bits [b*i, b*(i+1)) of a
little-endian word, of which the first b bytes are kept. For b = 3:

    byte      0                 1                 2
    bit       0 1 2 3 4 5 6 7   0 1 2 3 4 5 6 7   0 1 2 3 4 5 6 7
    code      0 0 0 1 1 1 2 2   2 3 3 3 4 4 4 5   5 5 6 6 6 7 7 7

The last group is cut after the last byte that holds a code. A mask is packed as 1-bit codes.
"""

import torch
from torch import Tensor

_GROUP = 8


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes, uint8 `[count]` with values below 2^bits, into uint8 `[packed_bytes(count, bits)]`.

    Raises:
        ValueError: `bits` is not from 1 to 8, or a code does not fit.
    """
    _check_bits(bits)
    flat = codes.reshape(-1)
    if flat.numel() and int(flat.max()) >> bits:
        raise ValueError(f"codes must be below 2^{bits}, got {int(flat.max())}")
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % _GROUP)).view(-1, _GROUP)
    words = torch.zeros(padded.shape[0], dtype=torch.int64, device=flat.device)
    for position in range(_GROUP):
        words |= padded[:, position].long() << (bits * position)
    packed = words.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)
    return packed[: packed_bytes(flat.numel(), bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack `count` codes of `bits` bits from uint8 bytes; returns uint8 `[count]`.

    Raises:
        ValueError: `bits` is not from 1 to 8, or there are more or fewer bytes than `count` codes take.
    """
    _check_bits(bits)
    if packed.numel() != packed_bytes(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, got {packed.numel()} bytes"
        )
    rows = torch.nn.functional.pad(packed.reshape(-1), (0, -packed.numel() % bits)).view(-1, bits)
    words = torch.nn.functional.pad(rows, (0, 8 - bits)).contiguous().view(torch.int64).view(-1)
    codes = torch.empty(words.shape[0], _GROUP, dtype=torch.uint8, device=packed.device)
    for position in range(_GROUP):
        codes[:, position] = ((words >> (bits * position)) & ((1 << bits) - 1)).to(torch.uint8)
    return codes.view(-1)[:count]


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be from 1 to 8, got {bits}")
