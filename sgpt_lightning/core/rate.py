"""The rate-coded solve: whole codes on a step per input channel, made for an entropy coder, within a budget of bytes.

Entropy coding makes the number of levels free, so what is left to choose is how coarse each step may be. A weight is

    q_rc = s_c k_rc / f_r      k any whole number

- Steps s_c = D U_cc, with U the factor of the inverse Hessian: the sweep's error is sum_rc e_rc^2 / U_cc^2, so every
  channel then adds the same, which is reverse water-filling (Cover and Thomas, Elements of Information Theory, section
  10.3.3). Channels that matter get fine steps, hence more bits; a weight much smaller than its step gets the code 0.
- Row scales f_r are the square root of what an error of the row costs the model's loss (`row_weights`).
- The level D is found on the coded size: bits fall by about one with every octave of D, so regula falsi on its
  logarithm needs a few sweeps.

Steps and row scales lie on logarithmic grids and take a byte each (`solution.Coded`).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.core.linear import LinearProblem
from sgpt_lightning.core.scales import ColumnScales
from sgpt_lightning.core.solution import (
    ROW_OCTAVE,
    STEP_OCTAVE,
    Coded,
    SolveError,
    octave_index,
    power_of_two,
    side_bytes,
)
from sgpt_lightning.core.sweep import sweep

CodedSize = Callable[[Tensor], int]
"""Bytes that codes, int32 `[out_features, in_features]`, take when they are entropy-coded."""

SWEEPS, MOST_SWEEPS = 5, 12
"""Sweeps after which any level that fits is taken, and after which all codes are 0 if none does."""
_CLOSE = 0.0015
"""Part of a budget that may be left over when the search ends early."""
LARGEST_CODE = 2**22
"""In magnitude, of a plain rounding."""


def least_coded_bits(weight: Tensor, coded_size: CodedSize) -> int:
    """Return the bits that a matrix takes in all with codes that are all 0."""
    return 8 * (coded_size(torch.zeros_like(weight, dtype=torch.int32)) + side_bytes(weight.shape))


def octaves_for(bits: float, rate: float) -> float:
    """Return by how much log2 of the level has to rise for so many bits a weight less, at about `rate` of them.

    An octave is a bit where there are many, and less where most codes are 0 already.
    """
    return bits / min(max(rate, 0.3), 1.0)


class RateProblem(NamedTuple):
    """A linear, ready to be swept at any level."""

    problem: LinearProblem
    target: Tensor
    """T with its rows scaled, float32 `[out_features, in_features]`."""
    steps: Tensor
    """Of the columns, as `solution.Coded` has them, uint8 `[in_features]`."""
    rows: Tensor
    """Of the rows, likewise, uint8 `[out_features]`."""

    def coded(self, codes: Tensor, level: float) -> Coded:
        """Return a solution."""
        return Coded(codes, torch.tensor([level], dtype=torch.float32, device=codes.device), self.steps, self.rows)

    def step_sizes(self, level: float) -> Tensor:
        """Return the steps of the columns at a level, float32 `[in_features]`."""
        return self.coded(self.target, level).step_sizes()

    def nearest_codes(self, level: float) -> Tensor:
        """Return the codes of a plain rounding, int32 `[out_features, in_features]`."""
        return (self.target / self.step_sizes(level)).round_().clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int32)

    def nearest_bits(self, level: float, coded_size: CodedSize) -> int:
        """Return the bits of a plain rounding, side information included: a little less than a sweep takes."""
        return 8 * (coded_size(self.nearest_codes(level)) + self.side_bytes)

    @property
    def spread(self) -> float:
        """Root mean square of the target in steps at level 1; 1 where there is nothing but zeros."""
        return float((self.target / self.step_sizes(1.0)).square().mean().sqrt()) or 1.0

    @property
    def level_of_unit_price(self) -> float:
        """The level at which every code adds 1/12 to the error under the Hessian and the row weights."""
        diagonal = self.problem.objective.input.factor.hinv_chol.diagonal()
        return float(diagonal.max() / _row_roots(self.problem).min())

    @property
    def side_bytes(self) -> int:
        """Bytes of what stands beside the codes: the level, the steps and the row scales."""
        return side_bytes(self.target.shape)


def rate_problem(problem: LinearProblem) -> RateProblem:
    """Scale rows and lay out steps; columns in their own order."""
    diagonal = problem.objective.input.factor.hinv_chol.diagonal()
    steps = octave_index(diagonal.max() / diagonal, STEP_OCTAVE)
    roots = _row_roots(problem)
    rows = octave_index(roots / roots.min(), ROW_OCTAVE)
    scaled = problem.objective.target / power_of_two(rows, ROW_OCTAVE)[:, None]
    return RateProblem(problem, scaled, steps, rows)


def _row_roots(problem: LinearProblem) -> Tensor:
    return problem.row_weights.clamp(1e-3, 1e3).sqrt()


def sweep_at(linears: Sequence[RateProblem], levels: Sequence[float]) -> list[Tensor]:
    """Return the codes of linears that share an input, each at a level of its own, int32 `[out, in]` each."""
    columns, recipe = linears[0].problem.objective.input.natural, linears[0].problem.recipe
    parts = [len(linear.target) for linear in linears]
    sizes = [linear.step_sizes(level) for linear, level in zip(linears, levels, strict=True)]
    scales = [ColumnScales.integer(size, part) for size, part in zip(sizes, parts, strict=True)]
    stacked = torch.cat([linear.target for linear in linears]).T
    swept = sweep(stacked, columns.factor.hinv_chol, None, ColumnScales.stacked(scales), recipe.block_size, parts)
    return [
        (weight.T / size).round_().to(torch.int32)
        for weight, size in zip(swept.weight.split(parts, 1), sizes, strict=True)
    ]


def solve_rates(linears: Sequence[RateProblem], budgets: Sequence[float], coded_size: CodedSize) -> list[Coded]:
    """Find, for each of some linears that share an input, the finest level whose codes fit its budget.

    Args:
        linears: the linears.
        budgets: bits that each may take, side information included.
        coded_size: bytes of codes when they are coded.

    Returns:
        A solution for each, never above its budget.

    Raises:
        SolveError: a budget is below what the coder and the side information take for codes that are all 0.
    """
    searches = [_Search(*each, coded_size) for each in zip(linears, budgets, strict=True)]
    for _ in range(MOST_SWEEPS):
        unsettled = [search for search in searches if not search.settled]
        if not unsettled:
            break
        swept = sweep_at([search.linear for search in unsettled], [2.0**search.octave for search in unsettled])
        for search, codes in zip(unsettled, swept, strict=True):
            search.saw(codes, 8 * (coded_size(codes) + search.linear.side_bytes))
    return [search.result() for search in searches]


class _Tried(NamedTuple):
    octave: float
    bits: float


class _Search:
    """The search for one linear's level: regula falsi on its logarithm, begun where plain rounding meets the budget.

    Bits fall as the level rises, but only on the whole: a sweep's codes at a level are not those at the next, so the
    ends of the interval are the finest level that fits and the coarsest that does not.
    """

    def __init__(self, linear: RateProblem, budget: float, coded_size: CodedSize) -> None:
        self.linear, self.budget = linear, budget
        least, weights = least_coded_bits(linear.target, coded_size), linear.target.numel()
        if budget < least:
            raise SolveError(
                f"{linear.problem.name or 'the linear'} takes {least / weights:.3f} bits a weight before any code is "
                f"written, got a budget of {budget / weights:.3f}"
            )
        self.octave = nearest_octave(linear, budget, coded_size)
        """log2 of the level to be tried next."""
        self.settled = False
        self._sweeps = 0
        self._fits: _Tried | None = None
        self._exceeds: _Tried | None = None
        self._codes: Tensor | None = None

    def saw(self, codes: Tensor, bits: int) -> None:
        """Note what a sweep at the present level took, and move on."""
        self._sweeps += 1
        tried = _Tried(self.octave, bits)
        if bits > self.budget:
            self._exceeds = tried
        elif self._fits is None or bits > self._fits.bits:
            self._fits, self._codes = tried, codes
        close = self._fits is not None and self._fits.bits >= self.budget * (1 - _CLOSE)
        self.settled = close or (self._fits is not None and self._sweeps >= SWEEPS)
        self.octave = self._next(tried)

    def _next(self, tried: _Tried) -> float:
        # Aimed a little below the budget, so that half the steps do not end just above it.
        aim, weights = self.budget * (1 - _CLOSE / 2), self.linear.target.numel()
        if self._fits is not None and self._exceeds is not None:
            share = (self._exceeds.bits - aim) / max(self._exceeds.bits - self._fits.bits, 1)
            return self._exceeds.octave + min(max(share, 0.05), 0.95) * (self._fits.octave - self._exceeds.octave)
        step = octaves_for((tried.bits - aim) / weights, self.budget / weights)
        return tried.octave + (1.2 if step > 0 else 1.0) * step * 1.5 ** max(self._sweeps - 2, 0)

    def result(self) -> Coded:
        if self._fits is None or self._codes is None:
            return self.linear.coded(torch.zeros_like(self.linear.target, dtype=torch.int32), 2.0**self.octave)
        return self.linear.coded(self._codes, 2.0**self._fits.octave)


def nearest_octave(linear: RateProblem, budget: float, coded_size: CodedSize) -> float:
    """Return log2 of the level at which plain rounding meets a budget in bits, within a few hundredths."""
    wanted = budget / linear.target.numel()
    octave = math.log2(linear.spread) + GAUSSIAN_BITS - wanted
    for _ in range(_NEAREST_STEPS):
        gap = linear.nearest_bits(2.0**octave, coded_size) / linear.target.numel() - wanted
        octave += min(max(gap, -4.0), 4.0)
        if abs(gap) < _NEAREST_CLOSE:
            break
    return octave


GAUSSIAN_BITS = 2.05
"""Entropy of a Gaussian of unit variance in steps of 1: log2(sqrt(2 pi e))."""
_NEAREST_STEPS = 6
_NEAREST_CLOSE = 0.02
