"""Fields of b bits in 32-bit words, so that 32 neighbouring threads read 32 neighbouring words and shift by constants.

A row of n fields has `lanes` = n // 32 lanes of 32 fields each: lane l holds the fields l, l + lanes, l + 2 * lanes
and so on. A lane is b words, and the words are stored plane by plane: first the lowest word of every lane, then the
second of every lane. The n % 32 fields that are left are one more lane, of as many words as they need, behind the
others. In a lane, field j takes bits [b j, b (j + 1)) of its words, the lowest word first. For b = 4 and n = 70:

    word     0            1            2            3            ...   6            7            8
    lane     0            1            0            1            ...   0            1            rest
    fields   0 2 4 .. 14  1 3 5 .. 15  16 18 .. 30  17 19 .. 31  ...   48 50 .. 62  49 51 .. 63  64 65 .. 69

So a row is a whole number of words, with less than one word of padding, and field j of all lanes is a piece of the row
without gaps: fields j * lanes to (j + 1) * lanes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LANE = 32
"""Fields of a lane, and bits of a word."""


class Run(NamedTuple):
    """Channels of one width that lie together in memory, on their way through a matrix's words or bytes."""

    bits: int
    first: int
    """Position of its first channel in the order of channels."""
    channels: int
    start: int
    """Its first word or byte."""


def row_words(count: int, bits: int) -> int:
    """Words that a row of `count` fields of `bits` bits takes."""
    return count // LANE * bits + -(-(count % LANE) * bits // LANE)


def lay_fields(fields: Tensor, bits: int) -> Tensor:
    """Lay rows of fields into words.

    Args:
        fields: whole numbers below 2^bits, `[rows, count]`.
        bits: from 1 to 32.

    Returns:
        int32 `[rows, row_words(count, bits)]`.
    """
    lanes = fields.shape[1] // LANE
    whole = _laid(fields[:, : lanes * LANE].unflatten(1, (LANE, lanes)), bits) if lanes else None
    rest = fields[:, lanes * LANE :]
    if not rest.shape[1]:
        assert whole is not None
        return whole
    padded = torch.nn.functional.pad(rest, (0, LANE - rest.shape[1]))[:, :, None]
    tail = _laid(padded, bits)[:, : row_words(rest.shape[1], bits)]
    return tail.contiguous() if whole is None else torch.cat([whole, tail], 1)


def _laid(fields: Tensor, bits: int) -> Tensor:
    """Lay `[rows, 32, lanes]` into `[rows, bits * lanes]`."""
    words = torch.zeros(len(fields), bits, fields.shape[2], dtype=torch.int32, device=fields.device)
    for j in range(LANE):
        field = fields[:, j].int()
        word, shift = divmod(j * bits, LANE)
        words[:, word] |= field << shift
        if shift + bits > LANE:
            words[:, word + 1] |= field >> (LANE - shift) & ((1 << (shift + bits - LANE)) - 1)
    return words.flatten(1)


def lift_fields(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the fields that `lay_fields` laid, int32 `[rows, count]`.

    Args:
        words: int32 `[rows, row_words(count, bits)]`.
        bits: from 1 to 31.
        count: fields of a row.
    """
    fields = torch.empty(len(words), count, dtype=torch.int32, device=words.device)
    lanes = count // LANE
    if lanes:
        planes = words[:, : lanes * bits].unflatten(1, (bits, lanes))
        _lift(planes, bits, fields[:, : lanes * LANE].unflatten(1, (LANE, lanes)))
    if count % LANE:
        _lift(words[:, lanes * bits :, None], bits, fields[:, lanes * LANE :, None])
    return fields


def _lift(planes: Tensor, bits: int, fields: Tensor) -> None:
    """Write the fields of `[rows, words, lanes]` into `[rows, fields, lanes]`."""
    mask = (1 << bits) - 1
    for j in range(fields.shape[1]):
        word, shift = divmod(j * bits, LANE)
        low = planes[:, word] >> shift
        if shift + bits > LANE:
            # A shift to the right drags the sign along.
            low &= (1 << (LANE - shift)) - 1
            low |= planes[:, word + 1] << (LANE - shift)
        torch.bitwise_and(low, mask, out=fields[:, j])


def lane_order(count: int, device: torch.device) -> Tensor:
    """Return the fields of a row lane by lane, int64 `[count]`; a mask's bits and survivors follow it."""
    lanes = count // LANE
    fields = torch.arange(count, device=device)
    return torch.cat([fields[: lanes * LANE].view(LANE, lanes).T.reshape(-1), fields[lanes * LANE :]])
