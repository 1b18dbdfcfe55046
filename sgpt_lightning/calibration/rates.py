"""How many bits each entropy-coded linear gets: one price for the whole model, and what is left over carried on.

At a price D every code of every linear adds D^2 / 12 to the model's loss (to second order, `gradients.py`), whatever
its row, channel or linear; that is the least loss for the bits, as in reverse water-filling. The bits of a linear at a
price are those of plain rounding on the dense model's Hessian, which takes no sweep and differs from a sweep's by
0.01 to 0.1 bits a weight, alike in all linears. In the run each linear is then solved for its own bits.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sgpt_lightning.core.rate import CodedSize, RateProblem

LEAST_RATE, MOST_RATE = 0.3, 8.0
"""Bits a weight that a linear is given at least and at most."""
_OCTAVES = range(-7, 4)
"""Levels at which the bits of a linear are looked up, around the spread of its weights."""


class RateCurve(NamedTuple):
    """Bits of one linear by price."""

    log_prices: np.ndarray
    """log2 of the price, ascending."""
    bits: np.ndarray
    """True bits of the linear, descending."""
    weights: int

    def at(self, log_price: float) -> float:
        """Return the bits at a price, between `LEAST_RATE` and `MOST_RATE` a weight."""
        bits = float(np.interp(log_price, self.log_prices, self.bits))
        return min(max(bits, LEAST_RATE * self.weights), MOST_RATE * self.weights)


def rate_curve(linear: RateProblem, mean_row_weight: float, coded_size: CodedSize) -> RateCurve:
    """Look up what a linear takes at several prices.

    Args:
        linear: on the dense model's inputs.
        mean_row_weight: mean over the rows of what a unit of squared output error costs the model's loss.
        coded_size: bytes of codes when they are coded.
    """
    unit = linear.level_of_unit_price / max(mean_row_weight, 1e-30) ** 0.5
    levels = [linear.spread * 2.0**octave for octave in _OCTAVES]
    bits = [linear.nearest_bits(level, coded_size) for level in levels]
    # Bits that do not fall (a handful of codes, whose tables weigh more) would make the curve ambiguous.
    return RateCurve(np.log2(np.array(levels) / unit), np.minimum.accumulate(bits), linear.target.numel())


def rates_at_one_price(curves: Mapping[str, RateCurve], budget: float) -> dict[str, float]:
    """Return the bits of each linear at the price at which they add up to a budget in bits.

    Raises:
        ValueError: the budget is below what all linears take at the least.
    """
    weights = sum(curve.weights for curve in curves.values())
    low = min(float(curve.log_prices[0]) for curve in curves.values())
    high = max(float(curve.log_prices[-1]) for curve in curves.values())
    least = sum(curve.at(high) for curve in curves.values())
    if least > budget:
        raise ValueError(
            f"target_bits_per_weight must be at least {least / weights:.3f} for this model, got {budget / weights:.3f}"
        )
    for _ in range(50):
        middle = (low + high) / 2
        fits = sum(curve.at(middle) for curve in curves.values()) <= budget
        low, high = (low, middle) if fits else (middle, high)
    return {name: curve.at(high) for name, curve in curves.items()}


class BitBudget:
    """True bits that linears may take: their own, and what those that were solved before them have left.

    Args:
        bits: of each linear, by name.
    """

    def __init__(self, bits: Mapping[str, float]) -> None:
        self._bits = dict(bits)
        self._left = 0.0

    def state(self) -> dict[str, Any]:
        """Return plain JSON values, from which `from_state` makes the same budget."""
        return {"bits": dict(self._bits), "left": self._left}

    @classmethod
    def from_state(cls, values: Mapping[str, Any]) -> "BitBudget":
        """Make the budget that `state` was asked of."""
        budget = cls(values["bits"])
        budget.add(values["left"])
        return budget

    def __contains__(self, name: object) -> bool:
        return name in self._bits

    def add(self, bits: float) -> None:
        """Note what is left over of something else."""
        self._left += bits

    def dealt(self, bits: Mapping[str, float]) -> "BitBudget":
        """Return a budget with other bits of some linears, and what this one has left over."""
        new = BitBudget({**self._bits, **bits})
        new.add(self._left)
        return new

    def of(self, names: Sequence[str]) -> list[float]:
        """Return what linears that are solved together may take; what is left over is shared in proportion."""
        own = [self._bits[name] for name in names]
        return [bits * (1 + self._left / sum(own)) for bits in own]

    def took(self, bits: Mapping[str, float]) -> None:
        """Note what linears that were solved together have taken."""
        self._left += sum(self._bits[name] for name in bits) - sum(bits.values())
