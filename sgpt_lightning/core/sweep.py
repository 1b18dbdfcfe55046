"""The column sweep that prunes and quantizes.

It is that of SparseGPT (arXiv 2301.00774, algorithm 1) and GPTQ (arXiv 2210.17323, algorithm 1): each column is
rounded to what will be stored, and its error is fed forward to the columns that are still free through the Cholesky
factor of the inverse Hessian. Pruning only, quantizing only and both are the same loop; what differs is whether a
column loses weights and whether the rest of it is rounded to a grid.

Matrices are held transposed, `[in_features, out_features]`, so that a column is contiguous. No step of the loops reads
a tensor's value back to Python. Here is what lies between the tiles of columns; the loop over the columns of a tile is
in `tiles.py`.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.core.masks import MaskRule, lowest, lowest_n_of_m
from sgpt_lightning.core.paths import TileLoops, with_loops
from sgpt_lightning.core.scales import ColumnScales
from sgpt_lightning.core.tiles import SweepTile

Mask = MaskRule | Sequence[MaskRule] | Tensor | None


class Swept(NamedTuple):
    """Result of a loop, inputs first: `[in_features, out_features]`."""

    weight: Tensor
    drop: Tensor


def sweep(
    weight_t: Tensor,
    hinv_chol: Tensor,
    mask: Mask,
    quantizer: ColumnScales | None,
    block_size: int,
    parts: Sequence[int] | None = None,
) -> Swept:
    """Solve the columns in order, `[in_features, out_features]` in and out; see the module's docstring.

    Args:
        weight_t: weights, inputs first; any floating dtype, solved in float32.
        hinv_chol: upper triangular factor of the inverse Hessian, float32 `[in_features, in_features]`.
        mask: what to remove: given (bool, True where removed), a rule, one rule for each of `parts`, or nothing.
        quantizer: grids of the columns, in the loop's order, or None to leave survivors unrounded.
        block_size: columns per block; rounded to whole N:M groups and whole groups that are fitted on the way, so that
            all of a group has seen the same errors.
        parts: out_features of each matrix, where several that share an input lie side by side; each of them is solved
            as if it were alone.

    Raises:
        ValueError: `parts` do not add up to out_features, rules are not as many as parts, or they mix N:M patterns.
    """
    removal = _removal(mask, parts, weight_t.shape[1])
    cuts = _Cuts(removal.n_m[1] if removal.n_m else 1, quantizer.refit_size if quantizer else None)
    size = cuts.whole_blocks(block_size)
    diagonal = hinv_chol.diagonal()

    def sweep_with(loops: TileLoops) -> Swept:
        weight = weight_t.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        drop = torch.zeros_like(weight, dtype=torch.bool)
        if isinstance(mask, Tensor):
            drop.copy_(mask)
        for start in range(0, len(weight), size):
            stop = min(start + size, len(weight))
            if removal.rules and not removal.n_m:
                scores = (weight[start:stop] / diagonal[start:stop, None]).square()
                removal.choose(scores, drop[start:stop], start)
            errors = torch.empty_like(weight[start:stop])
            for first, last in cuts.tiles(start, stop, loops.widest):
                tile, done = slice(first, last), errors[first - start : last - start]
                if quantizer is not None:
                    quantizer.reach(first, weight)
                n_m = removal.n_m
                if n_m and not cuts.aligned:
                    group = slice(first, first + n_m[1])
                    if first % n_m[1] == 0:
                        scores = (weight[group] / diagonal[group, None]).square()
                        drop[group] = lowest_n_of_m(scores, *n_m)
                    n_m = None
                removed = None if mask is None else drop[tile]
                loops.sweep(SweepTile(weight[tile], hinv_chol[tile, tile], done, removed, n_m, quantizer, first))
                if last < stop:
                    weight[last:stop].addmm_(hinv_chol[tile, last:stop].T, done, alpha=-1)
            weight[stop:].addmm_(hinv_chol[start:stop, stop:].T, errors, alpha=-1)
        return Swept(weight, drop)

    return with_loops(weight_t.device, sweep_with)


class _Removal(NamedTuple):
    """What a sweep is to choose, for each of the matrices that lie side by side."""

    rules: list[MaskRule]
    """One for each matrix; empty where the mask is given, or nothing goes."""
    parts: list[int]
    """out_features of each matrix."""

    @property
    def n_m(self) -> tuple[int, int] | None:
        return self.rules[0].n_m if self.rules else None

    def choose(self, scores: Tensor, drop: Tensor, start: int) -> None:
        """Mark what goes of a block of columns by a rule that is not N:M."""
        stop, ends = start + len(scores), itertools.accumulate(self.parts)
        for rule, part, end in zip(self.rules, self.parts, ends, strict=True):
            # The running total of removals is rounded, not each block's: k of the whole matrix is exact.
            k = round(rule.sparsity * (stop * part)) - round(rule.sparsity * (start * part))
            drop[:, end - part : end] = lowest(scores[:, end - part : end], k)


def _removal(mask: Mask, parts: Sequence[int] | None, out_features: int) -> _Removal:
    """Check masks and parts, and return them with a rule for each part."""
    sizes = [out_features] if parts is None else list(parts)
    if sum(sizes) != out_features:
        raise ValueError(f"parts {sizes} add up to {sum(sizes)}, but the weight has {out_features} out_features")
    if mask is None or isinstance(mask, Tensor):
        return _Removal([], sizes)
    rules = [mask] * len(sizes) if isinstance(mask, MaskRule) else list(mask)
    if len(rules) != len(sizes):
        raise ValueError(f"{len(sizes)} matrices are swept as one, but there are {len(rules)} rules")
    if len({rule.n_m for rule in rules}) > 1:
        raise ValueError(f"matrices that are swept as one have one pattern, but the rules are {rules}")
    return _Removal(rules, sizes)


class _Cuts(NamedTuple):
    """Where columns may be cut into blocks and tiles."""

    m: int
    """Columns of an N:M group; 1 where there are none."""
    group: int | None
    """Columns of a group whose grid is fitted when the loop reaches it, or None."""

    @property
    def aligned(self) -> bool:
        """Whether N:M groups end where tiles do, so that the loop over a tile can choose."""
        return self.group is None or self.group % self.m == 0

    def whole_blocks(self, block_size: int) -> int:
        """Return the columns of a block: whole groups of both kinds, as near below `block_size` as there are."""
        whole = math.lcm(self.m, self.group or 1)
        return max(block_size - block_size % whole, whole)

    def tiles(self, start: int, stop: int, widest: int | None) -> Iterator[tuple[int, int]]:
        """Cut a block where a group is fitted, where N:M groups need it, and into tiles that a loop can hold."""
        edges = {start, stop}
        if self.group:
            edges |= set(range(start, stop, self.group))
        if not self.aligned:
            edges |= set(range(start, stop, self.m))
        width = max((widest or stop - start) // self.m * self.m, self.m)
        for first, last in itertools.pairwise(sorted(edges)):
            for begin in range(first, last, width):
                yield begin, min(begin + width, last)
