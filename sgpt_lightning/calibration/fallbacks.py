"""Linears that were rounded plainly, because they could not be solved, and how many of them a run may have."""

import math
import warnings
from collections.abc import Collection, Mapping

from sgpt_lightning.core.solution import SolveError
from sgpt_lightning.format.records import SolvedLinear
from sgpt_lightning.recipe import Recipe


class Fallbacks:
    """Counts the linears of one run that were rounded plainly.

    Args:
        recipe: of the run; `on_failure` and `max_rounded` are read.
        linears: names of all linears that something is to be done to.
    """

    def __init__(self, recipe: Recipe, linears: Collection[str]) -> None:
        self.allowed = recipe.on_failure == "round"
        """Whether a linear that cannot be solved is rounded plainly."""
        self.reasons: dict[str, str] = {}
        """Why each was not solved, by name."""
        self._linears = len(linears)
        self._share = recipe.max_rounded

    def take_up(self, solved: Mapping[str, SolvedLinear]) -> None:
        """Count those of an earlier part of the run, which it goes on from, by the status that is stored."""
        rounded = [name for name, linear in solved.items() if linear.report.status == "rounded"]
        self.reasons |= dict.fromkeys(rounded, "before the run was stopped")

    def add(self, name: str, reason: str, *, warn: bool = True) -> None:
        """Note one more, and warn of it, unless another process does.

        Raises:
            SolveError: they are more than the recipe's share of the linears; all of them are named.
        """
        self.reasons[name] = reason
        if warn:
            warnings.warn(f"{name} is rounded plainly, since it cannot be solved: {reason}", stacklevel=2)
        most = math.floor(self._share * self._linears + _ROUNDING)
        if len(self.reasons) > most:
            every = "; ".join(f"{known} ({why})" for known, why in self.reasons.items())
            raise SolveError(
                f"{len(self.reasons)} of {self._linears} linears cannot be solved, max_rounded={self._share:g} allows "
                f"{most} to be rounded plainly: {every}"
            )


_ROUNDING = 1e-9
"""Of a share times a count: 0.3 of 10 linears are 3."""
