"""Which implementation of a loop a device gets: Triton's kernels on CUDA, plain torch or numpy everywhere else.

Both column loops have the same signature and do the same operations on a number in the same order; sums over columns
may be taken in another order, so a code whose weight is next to a tie may differ. Decoders agree on every code. Where
Triton is missing, does not know the GPU, or fails to compile, the others do the work; that is said once for the loops
and once for decoding, in a warning, and remembered for the process.
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
"""Why a type of device gets no kernels of a family; what has been said once is not said again."""


class Family(NamedTuple):
    """Kernels that are one module: where they cannot be used, others still may."""

    name: str
    work: str
    """What they do, as a warning says it."""
    instead: str
    """What does it without them."""


COLUMNS = Family("columns", "the column loops run", "plain torch")
DECODE = Family("decode", "codes are decoded", "numpy on the CPU")
ENCODE = Family("encode", "codes are encoded", "numpy on the CPU")
MATVEC = Family("matvec", "packed weights are multiplied", "plain torch, whole matrix by whole matrix,")
MASKED = Family("masked", "masked weights are multiplied and unpacked", "plain torch")
UNPACK = Family("unpack", "packed weights are unpacked", "plain torch")


class TileLoops(NamedTuple):
    """The loops over the columns of a tile, in one implementation."""

    sweep: Callable[[SweepTile], None]
    descend: Callable[[DescentTile], None]
    widest: int | None = None
    """Columns that a tile has at most, or None."""


TORCH = TileLoops(sweep_tile, descend_tile)


def loop_path(device: torch.device) -> LoopPath:
    """Return which implementation the column loops take on a device, as far as is known by now."""
    if device.type not in _KERNEL_DEVICES or _key(device, COLUMNS) in _refused or _reason_against(device, COLUMNS):
        return "torch"
    return "triton"


def gets_kernels(device: torch.device) -> bool:
    """Tell whether kernels are for a device of this type, if they can be used."""
    return device.type in _KERNEL_DEVICES


def with_loops(device: torch.device, solve: Callable[[TileLoops], Result]) -> Result:
    """Run `solve` with the loops that a device gets; if a kernel fails, run it again with those in torch.

    `solve` has to leave its inputs alone, or overwrite what a run that failed has left in them.
    """
    return with_kernels(device, COLUMNS, lambda kernels: solve(_loops_of(kernels)), lambda: solve(TORCH))


def with_kernels(
    device: torch.device, family: Family, launch: Callable[[ModuleType], Result], plain: Callable[[], Result]
) -> Result:
    """Run `launch` with a module of kernels where a device gets them; else, or if a kernel fails, run `plain`.

    Args:
        device: where the tensors are.
        family: which kernels.
        launch: takes their module. Like `plain`, it has to leave its inputs alone or overwrite what is left in them.
        plain: does the same without kernels.
    """
    if device.type not in _KERNEL_DEVICES or _key(device, family) in _refused:
        return plain()
    reason = _reason_against(device, family)
    if reason is None:
        kernels = _import(family)
        try:
            # Triton launches on the current GPU, wherever the tensors are.
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                return launch(kernels)
        except torch.OutOfMemoryError:
            raise
        except kernels.FAILURES as failure:
            reason = f"{type(failure).__name__}: {failure}"[:300]
    _refused[_key(device, family)] = reason
    warnings.warn(f"{family.work} in {family.instead} on {device}, not in Triton: {reason}", stacklevel=4)
    return plain()


def _key(device: torch.device, family: Family) -> str:
    return f"{family.name} on {device.type}"


def _import(family: Family) -> ModuleType:
    """Import kernels, and Triton with them; only where they may be wanted."""
    if family is DECODE:
        import sgpt_lightning.kernels.decode as decode

        return decode
    if family is ENCODE:
        import sgpt_lightning.kernels.encode as encode

        return encode
    if family is MATVEC:
        import sgpt_lightning.kernels.matvec as matvec

        return matvec
    if family is MASKED:
        import sgpt_lightning.kernels.masked as masked

        return masked
    if family is UNPACK:
        import sgpt_lightning.kernels.unpack as unpack

        return unpack
    import sgpt_lightning.kernels.columns as columns

    return columns


def _reason_against(device: torch.device, family: Family = COLUMNS) -> str | None:
    """Return what speaks against kernels before one is compiled, or None."""
    try:
        _import(family)
    except (ImportError, AttributeError) as missing:  # there is none, or one that is too old
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
