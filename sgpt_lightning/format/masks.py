"""Masks to bytes and back: a bit a weight, or per group of M inputs which N are zero. `packing.py` says more."""

import itertools
import math

import torch
from torch import Tensor

from sgpt_lightning.core.sizes import index_bits
from sgpt_lightning.format.bits import pack_bits, unpack_bits


def zero_patterns(n: int, m: int) -> Tensor:
    """All ways to place n zeros in m inputs, bool `[C(m, n), m]`, True where a weight survives."""
    survives = torch.ones(math.comb(m, n), m, dtype=torch.bool)
    for rank, zeros in enumerate(itertools.combinations(range(m), n)):
        survives[rank, list(zeros)] = False
    return survives


def rank_bits(n_m: tuple[int, int]) -> int:
    """Bits that tell apart the ways to place N zeros in M inputs; `n_m` is (N, M)."""
    return index_bits(math.comb(n_m[1], n_m[0]))


def zero_ranks(keep: Tensor, n_m: tuple[int, int]) -> Tensor:
    """Return which of `zero_patterns` each group of M inputs shows, uint8 `[groups]`."""
    n, m = n_m
    place = 1 << torch.arange(m, device=keep.device)
    patterns = (zero_patterns(n, m).to(keep.device) * place).sum(1)
    order = torch.argsort(patterns)
    found = torch.searchsorted(patterns[order], (keep.view(-1, m) * place).sum(1))
    return order[found].to(torch.uint8)


def pack_mask(keep: Tensor, n_m: tuple[int, int] | None) -> Tensor:
    """Pack a mask, bool `[out_features, in_features]`, by pattern where there is one; returns uint8."""
    return pack_bits(keep.to(torch.uint8), 1) if n_m is None else pack_bits(zero_ranks(keep, n_m), rank_bits(n_m))


def unpack_mask(packed: Tensor, shape: tuple[int, int], n_m: tuple[int, int] | None) -> Tensor:
    """Return the mask that `pack_mask` packed, bool of `shape`.

    Raises:
        ValueError: there are more or fewer bytes than the mask takes, or a rank names no pattern.
    """
    count = math.prod(shape)
    if n_m is None:
        return unpack_bits(packed, 1, count).bool().view(shape)
    n, m = n_m
    ranks = unpack_bits(packed, rank_bits(n_m), count // m)
    if int(ranks.max()) >= math.comb(m, n):
        raise ValueError(f"rank {int(ranks.max())} names no pattern of {n} zeros in {m}")
    return zero_patterns(n, m).to(packed.device)[ranks.long()].view(shape)
