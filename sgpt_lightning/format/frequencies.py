"""What a frequency table holds, and what codes cost under it; by whole numbers, so every machine agrees.

A table gives k and -k the same frequency (weights are as often positive as negative), and holds each as an eighth of
an octave in one byte: half the error of a step, 2 %, costs 0.0005 bits a code. The rule that makes 4,096 slots of it
is in `format/entropy.py`.
"""

from functools import lru_cache
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.format.contexts import LEVELS
from sgpt_lightning.format.rans import SLOT_BITS, SLOTS

LARGEST = 127
"""Largest magnitude in a table; what is beyond escapes."""
ENTRIES = 128
"""Entries that a table can hold of a magnitude."""
COST_UNIT = 1 << 16
"""Costs are counted in this part of a bit."""


class Tables(NamedTuple):
    """All frequency tables that there can be, in use or not, and what they are used for."""

    counts: Tensor
    """int64 `[LEVELS, LARGEST + 2]`: codes of each magnitude; the last column counts those beyond."""
    largest: Tensor
    """int64 `[LEVELS]`: largest magnitude in the table."""
    escapes: Tensor
    """int64 `[LEVELS]`: codes that escape."""
    entries: Tensor
    """int64 `[LEVELS, LARGEST + 2]`: the entry of each magnitude; the last column is the escape's."""

    def slots(self) -> Tensor:
        """Return the slots of each symbol, as `slots_of` does."""
        return slots_of(self.entries, self.largest, self.escapes > 0)

    def cost(self) -> Tensor:
        """What rANS spends on all codes, int64 scalar in `COST_UNIT`; it comes out so within about a bit a lane."""
        slots = self.slots()
        inside = torch.arange(LARGEST + 2, device=slots.device) <= self.largest[:, None]
        used = torch.cat([self.counts[:, :-1] * inside[:, :-1], self.escapes[:, None]], 1)
        return (used * _costs().to(slots.device)[slots]).sum()


def tables_of(heads: Tensor, chosen: Tensor) -> Tables:
    """Count codes and choose the tables, on their device.

    Args:
        heads: int32 `[out_features, in_features]`, the codes without their low bits.
        chosen: int16 `[out_features, in_features]`, the table of each.
    """
    magnitude = heads.abs().clamp(0, LARGEST + 1).to(torch.int16)
    counts = torch.bincount((chosen * (LARGEST + 2) + magnitude).reshape(-1), minlength=LEVELS * (LARGEST + 2))
    counts = counts.view(LEVELS, LARGEST + 2)
    total = counts.sum(1, keepdim=True)
    beyond = counts.flip(1).cumsum(1).flip(1)
    # A magnitude takes a byte and two slots of the others; an escape takes about six bits more than a table's symbol.
    largest = (beyond[:, 1:-1] > 2 + total // SLOTS).sum(1)
    escapes = beyond.gather(1, largest[:, None] + 1).squeeze(1)
    wanted = torch.cat([counts[:, :-1], escapes[:, None]], 1) * (16 * SLOTS) // total.clamp(min=1)
    wanted[:, 1:-1] //= 2
    # One slot comes with the symbol, and rounding down takes half a slot of 16 parts.
    entries = torch.bucketize(wanted - 8, torch.tensor(_entry_edges(), device=heads.device), right=True)
    return Tables(counts, largest, escapes, entries)


def slots_of(entries: Tensor, largest: Tensor, escapes: Tensor) -> Tensor:
    """Return how many of 4,096 slots each symbol has.

    Args:
        entries: int64 `[tables, LARGEST + 2]`: the entry of each magnitude, the last column the escape's.
        largest: int64 `[tables]`: largest magnitude in the table.
        escapes: bool `[tables]`: whether the table has an escape.

    Returns:
        int64 `[tables, LARGEST + 2]`: slots of each magnitude, for either sign; the last column is the escape's.
    """
    symbols = torch.arange(LARGEST + 2, device=entries.device)
    inside = symbols <= largest[:, None]
    inside[:, -1] = escapes
    signs = torch.where((symbols > 0) & (symbols <= LARGEST), 2, 1) * inside
    weights = torch.tensor(_weights(), device=entries.device)[entries]
    shared = SLOTS - signs.sum(1, keepdim=True)
    slots = inside + inside * (weights * shared // (weights * signs).sum(1, keepdim=True).clamp(min=1))
    left = SLOTS - (slots * signs).sum(1)
    pairs = torch.minimum(left // 2, largest)
    slots += (symbols > 0) & (symbols <= pairs[:, None])
    slots[:, 0] += left - 2 * pairs
    return slots


def _weights() -> list[int]:
    """Weight of each entry: 0, then eighths of octaves from 16 up."""
    return [0, *(isqrt(isqrt(isqrt(1 << (31 + entry)))) for entry in range(1, ENTRIES))]


def _entry_edges() -> list[int]:
    """From which weight on the entry is 1, 2, ...: half a step below its own."""
    return [isqrt(isqrt(isqrt(isqrt(1 << (61 + 2 * entry))))) + 1 for entry in range(1, ENTRIES)]


@lru_cache(maxsize=1)
def _costs() -> Tensor:
    slots = torch.arange(SLOTS + 1, dtype=torch.float64).clamp(min=1)
    return ((SLOT_BITS - slots.log2()) * COST_UNIT).round().long()
