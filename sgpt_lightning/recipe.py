"""What to do to which linear: the frozen settings of one compression run.

A recipe is plain data. It holds no tensors, knows no model, and checks itself when it is made, so that a bad value
is reported before a model is loaded. `Recipe.for_linear` is the only place where names are matched.

Left out on purpose: how calibration is run (see `callback.py`) and where results go (see `checkpoint.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Literal, get_args

Allocation = Literal["uniform", "quantile", "budget"]
MAX_BITS = 8


@dataclass(frozen=True)
class ImportanceWeights:
    """How much each of the five channel scores counts; non-negative and summing to 1."""

    activation: float = 0.25
    """Mean absolute input of the channel."""
    hessian: float = 0.25
    """1 / [H^-1]_jj: what the objective loses when the channel is removed."""
    weight: float = 0.15
    """Mean absolute weight of the column."""
    output: float = 0.25
    """Root mean square of the column times the channel's mean absolute input."""
    stability: float = 0.10
    """Variance of the channel's input."""

    def __post_init__(self) -> None:
        """Raise ValueError on a negative weight or a sum other than 1."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        negative = {name: value for name, value in values.items() if not value >= 0}
        if negative:
            raise ValueError(f"importance weights must not be negative, got {negative}")
        if not math.isclose(sum(values.values()), 1.0, abs_tol=1e-6):
            raise ValueError(f"importance weights must sum to 1, got {sum(values.values()):g} from {values}")


@dataclass(frozen=True)
class LayerRule:
    """Other settings for the linears whose full name matches `match`; fields left at None keep the recipe's value."""

    match: str
    """Shell-style pattern on the full name, for example `*.fc2`."""
    sparsity: float | None = None
    """Fraction of weights removed."""
    pattern: str | None = None
    """`N:M`: N zeros in every M consecutive inputs."""
    target_avg_bits: float | None = None
    """Mean bits per surviving weight."""
    widths: Sequence[int] | None = None
    """Allowed bit widths, ascending."""
    allocation: Allocation | None = None
    """How widths are dealt to channels."""

    def overrides(self) -> dict[str, object]:
        """Return the fields that this rule sets."""
        return {f.name: getattr(self, f.name) for f in fields(self)[1:] if getattr(self, f.name) is not None}


@dataclass(frozen=True)
class Recipe:
    """One compression run: pruning, bit widths, solver settings, and exceptions by name."""

    sparsity: float = 0.5
    """Fraction of weights removed from each linear, in [0, 1)."""
    pattern: str | None = None
    """`N:M` (N zeros in every M consecutive inputs) instead of `sparsity`."""
    target_avg_bits: float | None = 4.0
    """Mean code bits per surviving weight, at most; None prunes only."""
    widths: Sequence[int] = (2, 3, 4, 6, 8)
    """Allowed bit widths per input channel, ascending, each from 1 to 8."""
    allocation: Allocation = "budget"
    """`uniform` (one width), `quantile` (channels ranked by score) or `budget` (least predicted error)."""
    importance: ImportanceWeights = field(default_factory=ImportanceWeights)
    """Weights of the five channel scores."""
    damp_percent: float = 0.01
    """Damping as a fraction of the mean Hessian diagonal (0.01 = 1 %)."""
    block_size: int = 128
    """Columns solved between two updates of the rest of the matrix."""
    act_order: bool = False
    """Solve the columns with the largest Hessian diagonal first."""
    ignore: Sequence[str] = ()
    """Shell-style patterns of linears to leave alone."""
    rules: Sequence[LayerRule] = ()
    """Exceptions; where several match a linear, the last one wins."""

    def __post_init__(self) -> None:
        """Raise ValueError naming the argument, the rule and the value."""
        for name in ("widths", "ignore", "rules"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        if self.pattern is not None:
            parse_pattern(self.pattern)
        if not 0 < self.damp_percent <= 1:
            raise ValueError(f"damp_percent is a fraction in (0, 1], got {self.damp_percent}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        self._check_bits()
        for rule in self.rules:
            try:
                self._with(rule)
            except ValueError as error:
                raise ValueError(f"rule for {rule.match!r}: {error}") from error

    def _check_bits(self) -> None:
        widths = tuple(self.widths)
        if not widths or any(width not in range(1, MAX_BITS + 1) for width in widths):
            raise ValueError(f"widths must be whole numbers from 1 to {MAX_BITS}, got {list(widths)}")
        if list(widths) != sorted(set(widths)):
            raise ValueError(f"widths must be ascending without repeats, got {list(widths)}")
        if self.allocation not in get_args(Allocation):
            raise ValueError(f"allocation must be one of {', '.join(get_args(Allocation))}, got {self.allocation!r}")
        if self.target_avg_bits is None:
            return
        if self.allocation == "uniform" and self.target_avg_bits not in widths:
            raise ValueError(
                f"target_avg_bits must be one of the widths {list(widths)} when allocation is uniform, "
                f"got {self.target_avg_bits:g}"
            )
        if not widths[0] <= self.target_avg_bits <= widths[-1]:
            raise ValueError(
                f"target_avg_bits must lie between the narrowest and the widest of the widths {list(widths)}, "
                f"got {self.target_avg_bits:g}"
            )

    def _with(self, rule: LayerRule) -> "Recipe":
        overrides = rule.overrides()
        if "sparsity" in overrides and "pattern" not in overrides:
            overrides["pattern"] = None
        return replace(self, rules=(), **overrides)  # type: ignore[arg-type]

    @property
    def n_m(self) -> tuple[int, int] | None:
        """The pattern as (zeros, out of), or None when pruning is unstructured."""
        return None if self.pattern is None else parse_pattern(self.pattern)

    @property
    def prunes(self) -> bool:
        """Whether any weight is to be removed."""
        return self.pattern is not None or self.sparsity > 0

    @property
    def quantizes(self) -> bool:
        """Whether survivors are to be stored as codes."""
        return self.target_avg_bits is not None

    def for_linear(self, name: str) -> "Recipe | None":
        """Return the settings for the linear called `name`, or None if it is to be left alone."""
        if any(fnmatchcase(name, pattern) for pattern in self.ignore):
            return None
        resolved = replace(self, rules=())
        for rule in self.rules:
            if fnmatchcase(name, rule.match):
                resolved = resolved._with(rule)
        return resolved if resolved.prunes or resolved.quantizes else None

    def unmatched(self, names: Sequence[str]) -> list[str]:
        """Return the `ignore` patterns and rules that match none of `names`."""
        patterns = [*self.ignore, *(rule.match for rule in self.rules)]
        return [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]


def parse_pattern(pattern: str) -> tuple[int, int]:
    """Return (N, M) for the text `N:M`: N zeros in every M consecutive inputs, 0 < N < M."""
    zeros, colon, group = pattern.partition(":")
    if not colon or not zeros.isdecimal() or not group.isdecimal():
        raise ValueError(f"pattern must read N:M (N zeros in every M inputs), got {pattern!r}")
    if not 0 < int(zeros) < int(group):
        raise ValueError(f"pattern N:M needs 0 < N < M, got {pattern!r}")
    return int(zeros), int(group)
