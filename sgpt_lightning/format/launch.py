"""Weights in memory as the kernels take them."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sgpt_lightning.core.paths import MASKED, Family
from sgpt_lightning.format.fields import set_values_apart
from sgpt_lightning.format.layout import WeightSpec
from sgpt_lightning.format.planes import Run

_KINDS = (None, "zero-point", "offset", "zero-free")
"""Grids as kernels number them; None is coded."""


def has_kernels(spec: WeightSpec) -> bool:
    """Whether kernels know weights of this kind: all but patterns of N:M and what is not quantized."""
    return spec.layout == "coded" or (spec.layout in ("dense", "bitmap") and spec.widths is not None)


def family_of(spec: WeightSpec, dense: Family) -> Family:
    """Return the kernels for a weight: those for masked ones, or the others that were asked for."""
    return MASKED if spec.layout == "bitmap" else dense


def bands_of(kernels: ModuleType, spec: WeightSpec, runs: tuple[Run, ...], tensors: dict[str, Tensor]) -> list[Any]:
    """Describe a weight to kernels: one band of rows, or one for each width where rows have widths.

    Args:
        kernels: the module that has `Band`.
        spec: of the weight.
        runs: its runs.
        tensors: by name, floats as floats.
    """
    by_width = spec.width_axis == "input" and spec.grid in ("offset", "zero-free") and spec.group_size is None
    numbers = reversed(range(len(runs)))
    cut = [kernels.Run(*run, number if by_width else 0) for number, run in zip(numbers, runs, strict=True)]
    names = ("column_factors", "row_factors", "span", "origin", "apart_at", "apart", "apart_tiles")
    whole = kernels.Band(
        kind=_KINDS.index(spec.grid), words=tensors["words"], runs=tuple(cut), rows=spec.shape[0],
        columns=spec.shape[1], order=tensors.get("order"), row_order=None, group_size=spec.group_size or 0,
        widest=spec.widths[-1] if spec.widths else 0, **{name: tensors.get(name) for name in names},
    )  # fmt: skip
    if spec.width_axis == "input":
        return [whole]
    return [
        whole._replace(
            runs=(kernels.Run(run.bits, 0, spec.shape[1], run.start, 0),), rows=run.channels, order=None,
            row_order=tensors["order"][run.first : run.first + run.channels] if len(runs) > 1 else None,
        )
        for run in runs
    ]  # fmt: skip


def masked_runs(kernels: ModuleType, spec: WeightSpec, runs: tuple[Run, ...], tensors: dict[str, Tensor]) -> list[Any]:
    """Describe a masked weight to kernels, run by run; arguments as for `bands_of`."""
    assert spec.widths is not None
    by_rows, order = spec.width_axis == "output", tensors.get("order")
    by_width = not by_rows and spec.grid != "zero-point" and spec.group_size is None
    made, before, words = [], 0, 0
    for number, run in enumerate(runs):
        rows, count = (run.channels, spec.shape[1]) if by_rows else (spec.shape[0], run.channels)
        made.append(
            kernels.MaskedRun(
                kind=_KINDS.index(spec.grid), bits=run.bits, words=tensors["words"][run.start :],
                mask=tensors["mask"][words:], starts=tensors["starts"][before:], rows=rows,
                first=0 if by_rows else run.first, width=count, columns=spec.shape[1],
                order=None if by_rows else order,
                row_order=order[run.first : run.first + rows] if by_rows and order is not None else None,
                span=tensors["span"], origin=tensors["origin"], segment=len(runs) - 1 - number if by_width else 0,
                group_size=spec.group_size or 0, widest=spec.widths[-1],
            )
        )  # fmt: skip
        before, words = before + rows, words + rows * -(-count // 32)
    return made


def multiply(
    kernels: ModuleType, x: Tensor, spec: WeightSpec, runs: tuple[Run, ...], tensors: dict[str, Tensor]
) -> Tensor:
    """Multiply x with the transposed weight; as `Resident.matvec`."""
    parts = masked_runs(kernels, spec, runs, tensors) if "mask" in tensors else bands_of(kernels, spec, runs, tensors)
    return kernels.matvec(x.contiguous(), parts, spec.shape[0])


def unpack(
    kernels: ModuleType, spec: WeightSpec, runs: tuple[Run, ...], tensors: dict[str, Tensor], dtype: torch.dtype
) -> Tensor:
    """Unpack the whole weight; as `Resident.weight`."""
    if "mask" in tensors:
        return kernels.unpack(masked_runs(kernels, spec, runs, tensors), spec.shape, dtype)
    weight = kernels.unpack(bands_of(kernels, spec, runs, tensors), spec.shape, dtype)
    return set_values_apart(weight, tensors) if "apart" in tensors else weight
