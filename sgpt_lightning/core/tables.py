"""Tables of tokens and positions as whole codes: plain rounding, as fine as the bits that a table may take.

A table has no inputs to be solved against: a token reads a row as it is. So codes are the nearest ones, on one step for
all columns; what is to be found is how coarse it may be. A row that is read often has a finer step: an error of it
costs in proportion, as that of a linear's output does (`rate.py`), and its scale is the root of that.
"""

import math

import torch
from torch import Tensor

from sgpt_lightning.core.rate import GAUSSIAN_BITS, LARGEST_CODE, CodedSize, octaves_for
from sgpt_lightning.core.solution import ROW_OCTAVE, Coded, SolveError, octave_index, power_of_two, side_bytes

_CLOSE = 0.0005
"""Part of the bits that may be left over when the search ends early."""
_MOST_TRIALS = 16


def round_table(
    weight: Tensor, bits: float, coded_size: CodedSize, row_weights: Tensor | None = None, name: str = "the table"
) -> Coded:
    """Round a table to the finest codes that fit.

    Args:
        weight: `[rows, columns]`, any float dtype; a row is a token or a position.
        bits: of the whole table, at most: codes, their tables, and what stands beside them.
        coded_size: bytes of codes when they are coded.
        row_weights: what an error of each row costs, `[rows]`, positive, in any unit; all the same if None.
        name: for messages.

    Returns:
        Codes on one step for all columns, and a scale for each row.

    Raises:
        SolveError: the table holds NaN or inf, or does not fit.
    """
    if not bool(torch.isfinite(weight).all()):
        raise SolveError(f"{name} holds NaN or inf")
    weight = weight.detach().float()
    rows = _row_scales(weight, row_weights)
    steps = torch.zeros(weight.shape[1], dtype=torch.uint8, device=weight.device)
    scaled, side = weight / power_of_two(rows, ROW_OCTAVE)[:, None], side_bytes(weight.shape)

    def coded(octave: float) -> tuple[Coded, int]:
        codes = (scaled / 2.0**octave).round_().clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int32)
        level = torch.full((1,), 2.0**octave, dtype=torch.float32, device=weight.device)
        return Coded(codes, level, steps, rows), 8 * (coded_size(codes) + side)

    rate = bits / weight.numel()
    # Squares below float32 are no zeros: their root is then as large as the largest entry, at most.
    size = float(scaled.square().mean().sqrt()) or float(scaled.abs().max()) or 1.0
    octave = math.log2(size) + GAUSSIAN_BITS - rate
    best, most = None, 0
    for _ in range(_MOST_TRIALS):
        tried, taken = coded(octave)
        if most < taken <= bits:
            best, most = tried, taken
        if bits * (1 - _CLOSE) <= taken <= bits:
            break
        octave += octaves_for((taken - bits * (1 - _CLOSE / 2)) / weight.numel(), rate)
    if best is None:
        raise SolveError(f"{name} does not fit into {rate:.3f} bits a weight")
    return best


def _row_scales(weight: Tensor, row_weights: Tensor | None) -> Tensor:
    """Return the scale of each row as `solution.Coded` has them, uint8 `[rows]`."""
    if row_weights is None:
        return torch.zeros(len(weight), dtype=torch.uint8, device=weight.device)
    roots = row_weights.to(weight.device, torch.float32).sqrt()
    return octave_index(roots / roots.min(), ROW_OCTAVE)
