"""Fields of b bits out of 32-bit words, and what they stand for, in Triton; `format/planes.py` draws the words.

Blocks are `[rows, lanes]`: a warp has 32 lanes of a row, so it reads 32 neighbouring words, and all that is
known of a field but its word is known when the kernel is compiled.

Numbers and pointers of a launch are not specialized upon (`do_not_specialize`): each linear of a model has others, and
would have Triton compile the same kernel again for some seconds.

Importing this needs Triton.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Run(NamedTuple):
    """Columns of one width: bits, position of the first in the order, number, first word, segment of the grid."""

    bits: int
    first: int
    channels: int
    start: int
    segment: int


class Band(NamedTuple):
    """Rows of a weight that are cut into the same runs. What is absent is None."""

    kind: int
    """0 coded, 1 `zero-point`, 2 `offset`, 3 `zero-free`."""
    words: Tensor
    """int32."""
    runs: tuple[Run, ...]
    rows: int
    columns: int
    """in_features."""
    order: Tensor | None
    """The columns in the order of the runs."""
    row_order: Tensor | None
    """Which rows of the weight these are."""
    column_factors: Tensor | None
    """float32 `[in_features]`, in the order of the runs."""
    row_factors: Tensor | None
    """float32 `[out_features]`."""
    span: Tensor | None
    """`[out_features, segments]`."""
    origin: Tensor | None
    group_size: int
    """Columns of a segment, or 0."""
    widest: int
    """The widest width of the weight."""
    apart_at: Tensor | None
    """Codes beyond their fields: row * in_features + position of the column in the order of the runs, ascending."""
    apart: Tensor | None
    """int32, these codes."""
    apart_tiles: Tensor | None
    """How many lie before rows 0, 16, 32, ... and in all."""


def is_looped(band: Band, run: Run) -> bool:
    """Whether a program counts through the fields of a lane rather than has each as an instruction of its own."""
    return run.bits > 8 or band.group_size > 0


def pointers(band: Band) -> list[Any]:
    """Return the tensors as kernels take them; any other where one is absent."""
    tensors = [band.order, band.row_order, band.column_factors, band.row_factors, band.span, band.origin]
    tensors += [band.apart_at, band.apart, band.apart_tiles]
    return [band.words, *(band.words if tensor is None else tensor for tensor in tensors)]


@triton.jit
def row_words(columns, bits):
    """Words of a row."""
    return columns // 32 * bits + (columns % 32 * bits + 31) // 32


@triton.jit
def held_by(lane, columns):
    """Fields that each lane of a row has."""
    return tl.where(lane < columns // 32, 32, tl.where(lane == columns // 32, columns % 32, 0))


@triton.jit
def lane_words(base, lane, columns, BITS: tl.constexpr):
    """All words of lanes, as eight variables; read at once, so that none waits for another.

    A word that is not there is another one of the row: x is 0 for its fields.
    """
    a = _plane(base, lane, columns, BITS, 0)
    b = _plane(base, lane, columns, BITS, 1) if BITS > 1 else a
    c = _plane(base, lane, columns, BITS, 2) if BITS > 2 else a
    d = _plane(base, lane, columns, BITS, 3) if BITS > 3 else a
    e = _plane(base, lane, columns, BITS, 4) if BITS > 4 else a
    f = _plane(base, lane, columns, BITS, 5) if BITS > 5 else a
    g = _plane(base, lane, columns, BITS, 6) if BITS > 6 else a
    h = _plane(base, lane, columns, BITS, 7) if BITS > 7 else a
    return a, b, c, d, e, f, g, h


@triton.jit
def _plane(base, lane, columns, BITS: tl.constexpr, WORD: tl.constexpr):
    lanes = columns // 32
    place = tl.where(lane < lanes, WORD * lanes + lane, BITS * lanes + WORD)
    place = tl.minimum(place, row_words(columns, BITS) - 1)
    return tl.load(base + place).to(tl.uint32, bitcast=True)


@triton.jit
def _chosen(a, b, c, d, e, f, g, h, WORD: tl.constexpr):
    if WORD == 0:
        word = a
    elif WORD == 1:
        word = b
    elif WORD == 2:
        word = c
    elif WORD == 3:
        word = d
    elif WORD == 4:
        word = e
    elif WORD == 5:
        word = f
    elif WORD == 6:
        word = g
    else:
        word = h
    return word


@triton.jit
def field(a, b, c, d, e, f, g, h, J: tl.constexpr, BITS: tl.constexpr):
    """Field J of each lane, uint32."""
    found = _chosen(a, b, c, d, e, f, g, h, J * BITS // 32) >> (J * BITS % 32)
    if J * BITS % 32 + BITS > 32:
        found |= _chosen(a, b, c, d, e, f, g, h, J * BITS // 32 + 1) << (32 - J * BITS % 32)
    return found & ((1 << BITS) - 1)


@triton.jit
def placed(a, b, c, d, e, f, g, h, J: tl.constexpr, BITS: tl.constexpr):
    """Field J of each lane less half of the codes, as float32 at the place that it has in its word; at most 8 bits.

    A field in the lowest 23 bits of its word stays where it is. One above them is found 9 bits lower in a word that
    all of these share. So a code is one logical operation and one subtraction, and comes out multiplied with 2^place.
    """
    start: tl.constexpr = J * BITS % 32
    place: tl.constexpr = start if start + BITS <= 23 else (start - 9 if start + BITS <= 32 else 0)
    found = _chosen(a, b, c, d, e, f, g, h, J * BITS // 32)
    if start + BITS > 32:
        found = (found >> start) | (_chosen(a, b, c, d, e, f, g, h, J * BITS // 32 + 1) << (32 - start))
    elif start + BITS > 23:
        found = found >> 9
    return small_float(found & (((1 << BITS) - 1) << place)) - (8388608.0 + (1 << (BITS - 1 + place)))


@triton.jit
def place_worth(value, J: tl.constexpr, BITS: tl.constexpr):
    """Value times 2^place."""
    start: tl.constexpr = J * BITS % 32
    place: tl.constexpr = start if start + BITS <= 23 else (start - 9 if start + BITS <= 32 else 0)
    return value * (1.0 * (1 << place))


@triton.jit
def wide_field(base, lane, columns, j, bits):
    """Field j of each lane, where j is not known when the kernel is compiled; of at most 25 bits.

    What is not there is some field of the row, as with `lane_words`.
    """
    lanes, last = columns // 32, row_words(columns, bits) - 1
    word, shift = j * bits // 32, j * bits % 32
    place = tl.where(lane < lanes, word * lanes + lane, bits * lanes + word)
    onward = place + tl.where(lane < lanes, lanes, 1)
    low = tl.load(base + tl.minimum(place, last)).to(tl.uint32, bitcast=True)
    # Where a field ends with its word, all bits of the next one are cut off.
    high = tl.load(base + tl.minimum(onward, last)).to(tl.uint32, bitcast=True)
    # In two steps: a shift by 32 is none.
    return ((low >> shift) | (high << 1 << (31 - shift))) & ((1 << bits) - 1)


@triton.jit
def column_of(j, lane, columns):
    """Position in the row of field j of each lane."""
    return tl.where(lane < columns // 32, j * (columns // 32) + lane, columns // 32 * 32 + j)


@triton.jit
def small_float(code):
    """Return a whole number below 2^23, uint32, plus 2^23, as float32: its bits are those of the number."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def grid_scale(
    span, origin, row, segment, segments, there, KIND: tl.constexpr, BITS: tl.constexpr, WIDEST: tl.constexpr,
    QUICK: tl.constexpr = False,
):  # fmt: skip
    """Step and base of a width, as `grids.Grid.at` has them, to the last bit; quickly, to the last but one."""
    place = row.to(tl.int64) * segments + segment
    top: tl.constexpr = (1 << (BITS - 1 if KIND == 3 else BITS)) - 1
    size: tl.constexpr = 1.0 if top == 0 else 1.0 * top
    step = tl.load(span + place, mask=there, other=1.0).to(tl.float32)
    step = step * (1.0 / size) if QUICK else tl.div_rn(step, tl.full(step.shape, size, tl.float32))
    base = tl.load(origin + place, mask=there, other=0).to(tl.float32)
    if KIND == 1:
        if BITS != WIDEST:
            # Below 2^22, this rounds to the nearest whole number, halves to even.
            base = (base * (((1 << BITS) - 1) / ((1 << WIDEST) - 1)) + 12582912.0) - 12582912.0
    return step, base


@triton.jit
def grid_value(code, step, base, KIND: tl.constexpr, BITS: tl.constexpr):
    """What a code, uint32, stands for, as `grids.Scale.dequantize` has it; products and sums must stay apart."""
    if KIND == 1:
        value = step * ((small_float(code) - 8388608.0) - base)
    elif KIND == 2:
        value = step * (small_float(code) - 8388608.0) + base
    else:
        size = step * (small_float(code & ((1 << (BITS - 1)) - 1)) - 8388608.0) + base
        value = (size.to(tl.uint32, bitcast=True) ^ (code >> (BITS - 1) << 31)).to(tl.float32, bitcast=True)
    return value


@triton.jit
def grid_number(code, bits, span, origin, row, segment, segments, KIND: tl.constexpr, WIDEST: tl.constexpr):
    """What codes stand for, to the last bit, where their bits, uint32, are not known when the kernel is compiled."""
    at = row.to(tl.int64) * segments + segment
    one = tl.full(bits.shape, 1, tl.uint32)
    top = (one << (bits - (1 if KIND == 3 else 0))) - 1
    top = tl.maximum(top.to(tl.int32), 1).to(tl.float32)
    size = tl.load(span + at).to(tl.float32)
    step = tl.div_rn(size, top + tl.zeros(size.shape, tl.float32))
    base = tl.load(origin + at).to(tl.float32)
    if KIND == 1:
        # In float64, as the reference has the ratio; 1 for the widest, whose base is a whole number.
        ratio = ((one << bits) - 1).to(tl.float64) / tl.full(bits.shape, 1.0 * ((1 << WIDEST) - 1), tl.float64)
        base = (base * ratio.to(tl.float32) + 12582912.0) - 12582912.0
        value = step * (code.to(tl.int32).to(tl.float32) - base)
    elif KIND == 2:
        value = step * code.to(tl.int32).to(tl.float32) + base
    else:
        size = step * (code & ((one << (bits - 1)) - 1)).to(tl.int32).to(tl.float32) + base
        value = (size.to(tl.uint32, bitcast=True) ^ (code >> (bits - 1) << 31)).to(tl.float32, bitcast=True)
    return value
