"""What a compressed matrix costs, in bits, before and after it exists.

The packer (`format/packing.py`) and whoever plans for a budget (`solver.py`, `calibration/plan.py`) count with these
functions, so a plan and the file agree. Codes of one width, the mask and the widths of the channels are each padded to
whole bytes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from sgpt_lightning.core.grids import GridKind, WidthAxis, count_segments

Layout = Literal["dense", "bitmap", "pattern", "coded"]
MAX_GROUP = 16
"""Largest M of an N:M pattern that is stored by rank."""
SCALE_BITS = 16
"""Of the scale of an input channel, where channels have scales."""


def index_bits(count: int) -> int:
    """Bits that tell `count` things apart; at least one."""
    return max((count - 1).bit_length(), 1)


def mask_bits(shape: tuple[int, int], n_m: tuple[int, int] | None) -> dict[Layout, int]:
    """Bits of the mask in each layout that can hold it; `n_m` is (zeros, out of) or None for any mask."""
    weights = math.prod(shape)
    bits: dict[Layout, int] = {"bitmap": _whole_bytes(weights)}
    if n_m is not None and n_m[1] <= MAX_GROUP and math.comb(n_m[1], n_m[0]) <= 256:
        bits["pattern"] = _whole_bytes(weights // n_m[1] * index_bits(math.comb(n_m[1], n_m[0])))
    return bits


def grid_bits(
    kind: GridKind, axis: WidthAxis, widths: Sequence[int], shape: tuple[int, int], group_size: int | None
) -> int:
    """Bits of spans, origins and the width of each channel, spans in float16; `widths` are those in use."""
    segments = count_segments(kind, axis, widths, shape[1], group_size)
    per_segment = 24 if kind == "zero-point" else 32
    channels = shape[1] if axis == "input" else shape[0]
    indices = _whole_bytes(channels * index_bits(len(widths))) if len(widths) > 1 else 0
    return shape[0] * segments * per_segment + indices


def code_bits(weights_per_width: Mapping[int, int]) -> int:
    """Bits of the codes, given how many weights are stored at each width."""
    return sum(_whole_bytes(bits * count) for bits, count in weights_per_width.items())


def _whole_bytes(bits: int) -> int:
    return -(-bits // 8) * 8


def smallest_layout(
    dense: int, masked: int, shape: tuple[int, int], n_m: tuple[int, int] | None, *, zero_is_a_code: bool = True
) -> tuple[Layout, int]:
    """Choose among storing all weights and storing survivors behind a mask.

    Args:
        dense: bits of all weights.
        masked: bits of the survivors.
        shape: of the matrix.
        n_m: the pattern of the zeros, if there is one.
        zero_is_a_code: whether a removed weight can be written as a code or value.

    Returns:
        The layout and its bits, mask included.
    """
    priced: dict[Layout, int] = {"dense": dense} if zero_is_a_code else {}
    priced |= {layout: bits + masked for layout, bits in mask_bits(shape, n_m).items()}
    best = min(priced, key=lambda layout: priced[layout])
    return best, priced[best]
