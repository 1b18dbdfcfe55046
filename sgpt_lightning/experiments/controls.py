"""What only a study puts in place of a part of the solve: rules that the product's recipe has no words for.

A rule is a name with numbers, for the journal, and a context manager in which the solve follows it. It works by
putting another function in the place of one of the solver's, which is given back in `finally`; a recipe with
`allocation="quantile"` asks for widths by that name, so that is where rules for widths go.

- `thresholds`: three widths by fixed cuts of the mean importance, the fork's rule that this project starts from;
- `shuffled_scores`: the importance of other channels of the same linear, drawn at random: the same numbers, so the same
  widths as often, but for no reason.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sgpt_lightning.core import rounding, solver
from sgpt_lightning.core.grids import fit_affine_grid, quantize_matrix
from sgpt_lightning.core.importance import channel_importance
from sgpt_lightning.core.solution import CompressedLinear, Quantized
from sgpt_lightning.format.packing import pack_weight, unpack_weight
from sgpt_lightning.format.records import SolvedLinear, describe_linear
from sgpt_lightning.models.linears import set_weight_matrix, weight_matrix

THRESHOLDS = (0.5, 1.2)
"""Scores, with a mean of 1, above which a channel gets 4 and 8 bits instead of 2."""


@dataclass(frozen=True)
class Rule:
    """Another rule for one part of the solve."""

    identity: Mapping[str, Any]
    """Its name and numbers, plain JSON values."""
    followed: Callable[[int], AbstractContextManager[None]]
    """Called with a seed, a context in which every solve follows it."""
    show: Callable[[nn.Module, Sequence[Mapping[str, Tensor]]], None] | None = None
    """Called with the dense model and the calibration batches before that, if the rule wants to know them."""


@contextmanager
def replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Put something in the place of what a module calls by a name, and give that back."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def threshold_widths(scores: Tensor, widths: Sequence[int], target: float, counts: Tensor) -> Tensor:
    """Return 2, 4 or 8 bits for each channel by `THRESHOLDS`, uint8 `[in_features]`; there is no budget to keep to.

    Args:
        scores: importance, `[in_features]`.
        widths: unused, like `target` and `counts`: the rule has no budget, so it takes what bits it takes.
        target: unused.
        counts: unused.
    """
    relative = scores / scores.mean()
    low, high = THRESHOLDS
    return (2 + 2 * (relative > low) + 4 * (relative > high)).to(torch.uint8)


def thresholds() -> Rule:
    """Return the rule of three widths; for recipes with `allocation="quantile"`."""
    identity = {"rule": "thresholds", "cuts": list(THRESHOLDS), "widths": [2, 4, 8]}
    return Rule(identity, lambda seed: replaced(rounding, "allocate_quantile", threshold_widths))


def shuffled_scores() -> Rule:
    """Return the rule that gives every channel the importance of another one."""

    def followed(seed: int) -> AbstractContextManager[None]:
        generator = torch.Generator().manual_seed(seed)

        def shuffled(*arguments: Any) -> Tensor:
            scores = channel_importance(*arguments)
            return scores[torch.randperm(len(scores), generator=generator).to(scores.device)]

        return replaced(solver, "channel_importance", shuffled)

    return Rule({"rule": "shuffled scores"}, followed)


@torch.no_grad()
def round_to_nearest(linears: Mapping[str, nn.Module], bits: int) -> dict[str, SolvedLinear]:
    """Round every weight to a per-row min-max grid, in place and without calibration.

    Args:
        linears: by full name.
        bits: width of the codes.

    Returns:
        What to store, by name.
    """
    solved = {}
    for name, linear in linears.items():
        weight = weight_matrix(linear).float()
        widths = torch.full((weight.shape[1],), bits, dtype=torch.uint8, device=weight.device)
        grid = fit_affine_grid(weight, bits)
        solution = Quantized(quantize_matrix(weight, widths, grid), widths, grid)
        compressed = CompressedLinear(
            solution, relative_error=None, importance_range=(0.0, 0.0), damp_percent=0.0, status="ok"
        )
        packed = pack_weight(solution)
        set_weight_matrix(linear, unpack_weight(packed))
        solved[name] = SolvedLinear(packed.to("cpu"), describe_linear(name, compressed, packed))
    return solved
