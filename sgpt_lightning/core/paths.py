"""Which implementation of the column loops a device gets.

CPU tensors take the loops in plain torch (`tiles.py`).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import torch

from sgpt_lightning.core.tiles import DescentTile, SweepTile, descend_tile, sweep_tile

LoopPath = Literal["triton", "torch"]
Result = TypeVar("Result")


class TileLoops(NamedTuple):
    """The loops over the columns of a tile, in one implementation."""

    sweep: Callable[[SweepTile], None]
    descend: Callable[[DescentTile], None]
    widest: int | None = None
    """Columns that a tile has at most, or None."""


TORCH = TileLoops(sweep_tile, descend_tile)


def loop_path(device: torch.device) -> LoopPath:
    """Return which implementation the column loops take on a device."""
    return "torch"


def with_loops(device: torch.device, solve: Callable[[TileLoops], Result]) -> Result:
    """Run `solve` with the loops that the device gets."""
    return solve(TORCH)
