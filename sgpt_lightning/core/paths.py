"""Which implementation of the column loops a device gets: Triton's kernels on CUDA, plain torch everywhere else.

Both have the same signature and do the same operations on a number in the same order; sums over columns may be taken in
another order, so a code whose weight is next to a tie may differ. Where Triton is missing, does not know the GPU, or
fails to compile, torch does the work; that is said once, in a warning, and remembered for the process.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from sgpt_lightning.core.tiles import DescentTile, SweepTile, descend_tile, sweep_tile

LoopPath = Literal["triton", "torch"]
Result = TypeVar("Result")
_KERNEL_DEVICES = ["cuda"]
_OLDEST_CAPABILITY = (7, 0)
"""Below this, Triton's compiler stops the process rather than raise."""
_refused: dict[str, str] = {}
"""Why a type of device gets no kernels; what has been said once is not said again."""


class TileLoops(NamedTuple):
    """The loops over the columns of a tile, in one implementation."""

    sweep: Callable[[SweepTile], None]
    descend: Callable[[DescentTile], None]
    widest: int | None = None
    """Columns that a tile has at most, or None."""


TORCH = TileLoops(sweep_tile, descend_tile)


def loop_path(device: torch.device) -> LoopPath:
    """Return which implementation the column loops take on a device, as far as is known by now."""
    if device.type not in _KERNEL_DEVICES or device.type in _refused or _reason_against(device):
        return "torch"
    return "triton"


def with_loops(device: torch.device, solve: Callable[[TileLoops], Result]) -> Result:
    """Run `solve` with the loops that a device gets; if a kernel fails, run it again with those in torch.

    `solve` has to leave its inputs alone, or overwrite what a run that failed has left in them.
    """
    if device.type not in _KERNEL_DEVICES or device.type in _refused:
        return solve(TORCH)
    reason = _reason_against(device)
    if reason is None:
        kernels = _kernels()
        try:
            # Triton launches on the current GPU, wherever the tensors are.
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                return solve(_loops_of(kernels))
        except torch.OutOfMemoryError:
            raise
        except kernels.FAILURES as failure:
            reason = f"{type(failure).__name__}: {failure}"[:300]
    _refused[device.type] = reason
    warnings.warn(f"the column loops run in plain torch on {device}, not in Triton: {reason}", stacklevel=3)
    return solve(TORCH)


def _kernels() -> ModuleType:
    """Import the kernels, and Triton with them; only where they may be wanted."""
    import sgpt_lightning.kernels.columns as kernels

    return kernels


def _reason_against(device: torch.device) -> str | None:
    """Return what speaks against kernels before one is compiled, or None."""
    try:
        _kernels()
    except ImportError as missing:
        return f"Triton cannot be imported ({missing})"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST_CAPABILITY:
            return f"compute capability {capability[0]}.{capability[1]} is below {_OLDEST_CAPABILITY[0]}.0"
    return None


def _loops_of(kernels: ModuleType) -> TileLoops:
    """Return the kernels as loops over tiles."""

    def levels(tile: SweepTile | DescentTile) -> Any:
        if tile.scales is None:
            return None
        columns = slice(tile.start, tile.start + len(tile.weight))
        scales = tile.scales
        return kernels.Levels(scales.kind, scales.step, scales.base, scales.top, scales.index[columns])

    def sweep(tile: SweepTile) -> None:
        kernels.sweep_tile(tile.weight, tile.factor, tile.errors, tile.drop, tile.n_m, levels(tile))

    def descend(tile: DescentTile) -> None:
        drop = None if tile.drop is None else tile.drop.contiguous()
        kernels.descend_tile(tile.weight, tile.pull, tile.hessian, tile.moves, drop, levels(tile))

    return TileLoops(sweep, descend, kernels.WIDEST_TILE)
