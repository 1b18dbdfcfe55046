"""Entropy-coded streams to codes as a Triton kernel: a program a stream, its lanes side by side, whole numbers only.

The format is that of `format/entropy.py`. What a lane does next depends on its state, so a stream takes as long as it
has steps, whatever the GPU; streams are independent, and matrices are decoded in one launch to have more of them. One
warp a program: the lanes that take a word count themselves by a prefix sum within the warp. The table of the next code
is looked up while the current one is decoded: it does not depend on the state.

Damaged streams lead to wrong codes and are reported, and nothing else: a stream reads words between its own ends and
table entries of its own matrix, and takes the steps that the shape asks for.

Importing this needs Triton.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgpt_lightning.kernels.columns import FAILURES as FAILURES

LANES = 64
"""Lanes of a program; a stream has as many or fewer."""
ESCAPED = 128
"""Stands in the codes where the escape was: one more than the largest magnitude of a table."""
MOST_COLUMNS = 1 << 30
"""Columns that a matrix may have: places within a stream are counted in 32 bits."""
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}


class Matrix(NamedTuple):
    """What the kernel has to know of a matrix: where in `Streams` its part starts, and numbers of its header."""

    words: int
    word_count: int
    offsets: int
    first: int
    """Its first stream."""
    streams: int
    steps: int
    lanes: int
    """Of a stream."""
    codes: int
    code_count: int
    row_levels: int
    column_levels: int
    columns: int
    entries: int
    base: int
    lowest: int
    highest: int
    breadth: int


class Streams(NamedTuple):
    """The streams of some matrices on one device; the parts of the matrices lie one behind the other."""

    words: Tensor
    """int16 `[words]`: the bits of 16-bit words."""
    offsets: Tensor
    """int32 `[streams - matrices]`: where a matrix' second, third, ... stream starts, counted from its first word."""
    entries: Tensor
    """int32 `[tables * 4096]`: the bits of frequency - 1 | slot - first slot of the symbol << 12 | symbol << 24."""
    row_levels: Tensor
    """int16: levels of rows, as `entropy.py` stores them."""
    column_levels: Tensor
    """int16: levels of columns."""
    matrices: Tensor
    """int64 `[matrices, fields of Matrix]`."""
    owners: Tensor
    """int32 `[streams]`: the matrix of each stream."""


def decode_streams(streams: Streams, total: int) -> tuple[Tensor, Tensor]:
    """Decode streams on their device, without waiting for it.

    Args:
        streams: what to decode.
        total: codes of all matrices.

    Returns:
        The codes, int32 `[total]`, `ESCAPED` for the escape; and whether words and codes of each stream do not end
        together, int32 `[streams]`, 0 where all is well.
    """
    codes = torch.empty(total, dtype=torch.int32, device=streams.words.device)
    faults = torch.empty_like(streams.owners)
    _decode[(faults.numel(),)](*streams, codes, faults, LANES=LANES, FIELDS=len(Matrix._fields), **OPTIONS)
    return codes, faults


@triton.jit
def _decode(
    words, offsets, entries, row_levels, column_levels, matrices, owners, codes, faults,
    LANES: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    stream = tl.program_id(0)
    matrix = matrices + tl.load(owners + stream).to(tl.int64) * FIELDS
    # In the order of `Matrix`.
    words += tl.load(matrix)
    word_count = tl.load(matrix + 1).to(tl.int32)
    offsets += tl.load(matrix + 2)
    number = stream - tl.load(matrix + 3).to(tl.int32)
    last = tl.load(matrix + 4).to(tl.int32) - 1
    steps, lanes = tl.load(matrix + 5).to(tl.int32), tl.load(matrix + 6).to(tl.int32)
    before = number.to(tl.int64) * (steps * lanes)
    codes += tl.load(matrix + 7) + before
    count = tl.minimum(tl.load(matrix + 8) - before, steps * lanes).to(tl.int32)
    columns = tl.load(matrix + 11).to(tl.int32)
    row_levels += tl.load(matrix + 9) + before // columns
    column_levels += tl.load(matrix + 10)
    column = (before % columns).to(tl.int32)
    entries += tl.load(matrix + 12)
    base, lowest = tl.load(matrix + 13).to(tl.int32), tl.load(matrix + 14).to(tl.int32)
    highest, breadth = tl.load(matrix + 15).to(tl.int32), tl.load(matrix + 16).to(tl.int32)

    begin = tl.load(offsets + number - 1, mask=number > 0, other=0)
    end = tl.load(offsets + number, mask=number < last, other=word_count)
    whole = (begin >= 0) & (begin + 2 * lanes <= end) & (end <= word_count)
    words += tl.where(whole, begin, 0)
    length = tl.where(whole, end - begin, 0)

    lane = tl.arange(0, LANES)
    exists = lane < tl.where(length > 0, lanes, 0)
    state = _word(words + 2 * lane, exists) | (_word(words + 2 * lane + 1, exists) << 16)
    cursor = 2 * lanes
    code = lane
    table = _table(
        column + code, (lane < lanes) & (code < count), row_levels, column_levels, columns, base, lowest, highest,
        breadth,
    )  # fmt: skip
    for _ in range(steps):
        here = (lane < lanes) & (code < count)
        onward = code + lanes
        slot = (state & 4095).to(tl.int32)
        entry = tl.load(entries + (table + slot), mask=here, other=0).to(tl.uint32, bitcast=True)
        table = _table(
            column + onward, (lane < lanes) & (onward < count), row_levels, column_levels, columns, base, lowest,
            highest, breadth,
        )  # fmt: skip
        moved = ((entry & 4095) + 1) * (state >> 12) + ((entry >> 12) & 4095)
        state = tl.where(here, moved, state)
        asks = here & (state < 65536)
        order = tl.cumsum(asks.to(tl.int32), axis=0)
        at = cursor + order - 1
        word = _word(words + at, asks & (at < length))
        state = tl.where(asks, (state << 16) | word, state)
        cursor += tl.sum(asks.to(tl.int32), axis=0)
        symbol = (entry >> 24).to(tl.int32)
        tl.store(codes + code, tl.where(symbol % 2 == 1, (symbol + 1) // 2, -(symbol // 2)), mask=here)
        code = onward

    ended = (cursor <= length) & (tl.max((exists & (state != 65536)).to(tl.int32), axis=0) == 0)
    rest = tl.zeros_like(state)
    for at in range(cursor, length, LANES):
        rest |= _word(words + at + lane, at + lane < length)
    ended = ended & (tl.max((rest != 0).to(tl.int32), axis=0) == 0)
    tl.store(faults + stream, 1 - (ended & whole).to(tl.int32))


@triton.jit
def _word(place, mask):
    return tl.load(place, mask=mask, other=0).to(tl.uint32) & 0xFFFF


@triton.jit
def _table(place, mask, row_levels, column_levels, columns, base, lowest, highest, breadth):
    """Where the tables of codes start among the entries; places count from the first code of a row."""
    level = tl.load(row_levels + place // columns, mask=mask, other=0).to(tl.int32)
    level += tl.load(column_levels + place % columns, mask=mask, other=0).to(tl.int32) + base
    return (tl.minimum(tl.maximum(level, lowest), highest) - lowest) // breadth * 4096
