"""Which frequency table a code is coded with; by whole numbers, so every machine agrees.

A code is small where its row and its column are. The mean magnitude of a row, of a column and of the matrix is held as
a level, four to the octave; row plus column minus matrix is the level to expect of a code. Codes of one level, or of a
few neighbouring ones in a small matrix, share a table. Tables of large codes leave aside the low bits that no table
could predict.

Measured on rounded weights of opt-mini and opt-small, 1.5 and 3 bits, scales and tables included: tables a quarter of
an octave wide beat half an octave by 0.1 to 0.3 %, levels of an eighth lose what they gain in bytes; what the left and
upper neighbours of a code say beyond its level is less than a random split of the table gains by chance.
"""

from functools import lru_cache
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

LIMIT = (1 << 24) - 1
"""Largest magnitude of a code: a float32 weight has no more digits."""
LEVELS = 129
"""Levels of a mean magnitude: level j is a mean of about 2^(j / 4 - 8), level 0 all below."""
_FEW = 256
"""Codes at either end of the levels that are no reason for a table of their own."""


class Contexts(NamedTuple):
    """Levels of a matrix of codes, and how they share tables."""

    rows: Tensor
    """int16 `[out_features]`: level of each row."""
    columns: Tensor
    """int16 `[in_features]`: level of each column."""
    matrix: Tensor
    """int16 scalar: level of the matrix."""
    lowest: Tensor
    """int64 scalar: the level where the first table starts; lower ones share it."""
    highest: Tensor
    """int64 scalar: the last level of the last table; higher ones share it."""
    breadth: int
    """Levels of one table."""

    def tables(self) -> Tensor:
        """Return the table of each code, int16 `[out_features, in_features]`."""
        levels = level_of(self.rows, self.columns, -self.matrix)
        return table_of(levels, self.lowest, self.highest, self.breadth).to(torch.int16)

    def shifts(self) -> Tensor:
        """Return the low bits of a code that each table leaves aside, int32 `[LEVELS]`."""
        first = self.lowest + self.breadth * torch.arange(LEVELS, device=self.rows.device)
        return shift_of(first).int()


def contexts_of(codes: Tensor) -> Contexts:
    """Find the levels in use for int32 `[out_features, in_features]`, on its device and without a host read."""
    magnitude = codes.abs()
    row_sums, column_sums = magnitude.sum(1), magnitude.sum(0)
    rows, columns = _levels(row_sums, codes.shape[1]), _levels(column_sums, codes.shape[0])
    matrix = _levels(row_sums.sum(), codes.numel())
    every = torch.arange(LEVELS, dtype=torch.int16, device=codes.device)
    row_counts, column_counts = ((of[:, None] == every).sum(0) for of in (rows, columns))
    levels = level_of(every, every, -matrix).clamp(0, LEVELS - 1)
    counts = torch.zeros(LEVELS, dtype=torch.int64, device=codes.device)
    counts.index_add_(0, levels.reshape(-1).int(), torch.outer(row_counts, column_counts).reshape(-1))
    seen = counts.cumsum(0)
    few = ((seen[-1] - 1) // 2).clamp(max=_FEW)
    lowest, highest = (seen <= few).sum(), (seen < seen[-1] - few).sum()
    return Contexts(rows, columns, matrix, lowest, highest, _breadth(codes.numel()))


def level_of(rows: Tensor, columns: Tensor, base: Tensor | int) -> Tensor:
    """Return the level to expect of each code, int16 `[out_features, in_features]`, before it is limited."""
    return rows[:, None] + columns[None, :] + base


def table_of(levels: Tensor, lowest: Tensor, highest: Tensor, breadth: int) -> Tensor:
    """Return the table that codes of a level share."""
    return (levels.clamp(lowest, highest) - lowest) // breadth


def shift_of(level: Tensor) -> Tensor:
    """Low bits that a table leaves aside, from its first level; what is left has a mean magnitude below 16 or so."""
    return (level // 4 - 11).clamp(min=0)


def _breadth(count: int) -> int:
    """Levels of a table: narrow ones describe the codes better, and cost their bytes again."""
    return 1 << min(max((19 - count.bit_length()) // 2, 0), 7)


def _levels(sums: Tensor, count: int) -> Tensor:
    edges = torch.tensor(_level_edges(count), device=sums.device)
    return torch.bucketize(sums, edges, right=True).to(torch.int16)


@lru_cache(maxsize=256)
def _level_edges(count: int) -> list[int]:
    """From which sum of `count` magnitudes the level is 1, 2, ...: count * 2^((2 j - 1) / 8 - 8), rounded up."""
    roots = (isqrt(isqrt(isqrt(count**8 << (2 * level - 1)))) + 1 for level in range(1, LEVELS))
    return [-(-root // 256) for root in roots]
