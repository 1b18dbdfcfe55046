"""Masked weights in memory: masks, and survivors behind them. `resident.py` says what the tensors hold."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.core.solution import Pruned, Quantized
from sgpt_lightning.format.fields import grid_tensors, members, order_tensor, rows_of_run, runs_of, widths_and_grid
from sgpt_lightning.format.layings import Laying, laying_of
from sgpt_lightning.format.layout import PackedWeight, WeightSpec
from sgpt_lightning.format.masks import rank_bits, zero_patterns, zero_ranks
from sgpt_lightning.format.planes import Run

_AS_ONE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""What is as large as a pattern of so many inputs: looked up as one number, it takes a tenth of the time."""


class _Part(NamedTuple):
    """A run, and where its survivors and their mask are."""

    run: Run
    rows: Tensor | slice
    """Its rows."""
    channels: Tensor
    """Its columns, int64."""
    columns: Tensor
    """The same in the order in which survivors lie."""
    height: int
    """Number of rows."""
    before: int
    """Rows of the runs before it."""
    mask: int
    """Where its bitmap begins."""


def _parts(
    spec: WeightSpec, runs: tuple[Run, ...], order: Tensor | None, device: torch.device, laying: Laying
) -> Iterator[_Part]:
    by_rows, before, mask = spec.width_axis == "output", 0, 0
    for run in runs:
        channels, columns = members(order, run), torch.arange(spec.shape[1], device=device)
        columns = columns if by_rows else columns[channels]
        sorted_columns = columns if spec.n_m is not None else columns[laying.order(len(columns), device)]
        height = run.channels if by_rows else spec.shape[0]
        yield _Part(run, channels if by_rows else slice(None), columns, sorted_columns, height, before, mask)
        before, mask = before + height, mask + height * laying.size(len(columns), 1)


def of_masked(
    solution: Pruned | Quantized, packed: PackedWeight, laying: Laying
) -> tuple[tuple[Run, ...], dict[str, Tensor]]:
    """Lay out the survivors of a mask."""
    spec, keep = packed.spec, solution.keep
    assert keep is not None
    if isinstance(solution, Quantized):
        name, values, widths, beside = laying.name, solution.codes, solution.widths, grid_tensors(packed)
    else:
        name, values, widths, beside = "values", solution.values, keep.new_zeros(spec.shape[1]), {}
    sorted_runs, order = runs_of(widths, spec.shape, spec.width_axis == "output", laying)
    runs, masks, starts = [], [], []
    streams: list[Tensor] = []
    for part in _parts(spec, sorted_runs, order, keep.device, laying):
        kept = keep[part.rows][:, part.columns]
        counts = kept.sum(1)
        masks.append(laying.lay(keep[part.rows][:, part.channels], 1).view(-1))
        starts.append((counts.cumsum(0) - counts).int())
        runs.append(part.run._replace(start=sum(len(stream) for stream in streams)))
        survivors = values[part.rows][:, part.columns][kept]
        streams.append(survivors if name == "values" else laying.lay_stream(survivors, part.run.bits))
    tensors = {name: torch.cat(streams), "mask": torch.cat(masks)} | order_tensor(order)
    if spec.n_m is not None:
        ranks = zero_ranks(keep, spec.n_m).view(spec.shape[0], -1)
        tensors["mask"] = laying.lay(ranks, rank_bits(spec.n_m)).view(-1)
    if spec.n_m is None or len(runs) > 1:
        tensors["starts"] = torch.cat(starts)
    return tuple(runs), tensors | beside


def read(
    spec: WeightSpec, runs: tuple[Run, ...], tensors: dict[str, Tensor], index: Tensor | None
) -> Pruned | Quantized:
    """Read all rows of a matrix, or those of an index, int64 `[n]`."""
    laying = laying_of(tensors)
    stream = tensors["values" if spec.widths is None else laying.name]
    order, by_rows = tensors.get("order"), spec.width_axis == "output"
    rows = spec.shape[0] if index is None else len(index)
    keep = torch.zeros(rows, spec.shape[1], dtype=torch.bool, device=stream.device)
    values = torch.zeros(keep.shape, dtype=stream.dtype if spec.widths is None else torch.uint8, device=stream.device)
    patterns = None if spec.n_m is None else _patterns(spec, tensors["mask"], index, laying)
    for part in _parts(spec, runs, order, stream.device, laying):
        here, place = rows_of_run(order if by_rows else None, part.run, index)
        kept = _kept(part, tensors["mask"], place, laying) if patterns is None else patterns[here][:, part.columns]
        own = stream_of(runs, part.run, stream)
        if index is None:
            found = own if spec.widths is None else laying.lift_stream(own, part.run.bits, int(kept.sum()))
        else:
            places = kept.cumsum(1) - 1 + _starts(spec, tensors, part.before, place)[:, None]
            numbers = places[kept]
            found = own[numbers] if spec.widths is None else laying.lift_some(own, part.run.bits, numbers)
        spread = torch.zeros(kept.shape, dtype=values.dtype, device=kept.device).masked_scatter_(kept, found)
        _put(values, spread, here, part.columns)
        _put(keep, kept, here, part.columns)
    if spec.widths is None:
        return Pruned(values, keep, spec.n_m)
    scale = tensors.get("channel_scale")
    return Quantized(values, *widths_and_grid(spec, runs, tensors, index), keep, spec.n_m, scale)


def _kept(part: _Part, mask: Tensor, rows: Tensor | slice, laying: Laying) -> Tensor:
    """Return the mask of some rows of a run, in the order of its survivors."""
    count = len(part.columns)
    each = laying.size(count, 1)
    laid = mask[part.mask : part.mask + part.height * each].view(part.height, each)[rows]
    return laying.lift(laid, 1, count).bool()[:, laying.order(count, mask.device)]


def _put(matrix: Tensor, part: Tensor, rows: Tensor | slice, columns: Tensor) -> None:
    if isinstance(rows, Tensor):
        matrix[rows[:, None], columns] = part
    else:
        matrix[:, columns] = part


def _patterns(spec: WeightSpec, mask: Tensor, index: Tensor | None, laying: Laying) -> Tensor:
    """Return the mask of some rows, by their ranks."""
    assert spec.n_m is not None
    laid, groups = mask.view(spec.shape[0], -1), spec.shape[1] // spec.n_m[1]
    ranks = laying.lift(laid if index is None else laid[index], rank_bits(spec.n_m), groups)
    patterns = zero_patterns(*spec.n_m).to(mask.device)
    if (wide := _AS_ONE.get(spec.n_m[1])) is not None:
        return (
            patterns.view(wide).view(-1).index_select(0, ranks.int().view(-1)).view(torch.bool).view(-1, spec.shape[1])
        )
    return patterns[ranks.long()].flatten(1)


def _starts(spec: WeightSpec, tensors: dict[str, Tensor], first: int, rows: Tensor | slice) -> Tensor:
    """Return how many survivors lie before some rows of a run, int64."""
    if "starts" in tensors:
        return tensors["starts"][first:][rows].long()
    assert spec.n_m is not None
    assert isinstance(rows, Tensor)
    return rows * (spec.shape[1] // spec.n_m[1] * (spec.n_m[1] - spec.n_m[0]))


class Mask(NamedTuple):
    """The mask of a run, for those who read it whole."""

    kept: Tensor
    """Rows of its bitmap as they lie, or, of a pattern, bool `[rows, columns]`."""
    of_bits: bool


def kept_of(spec: WeightSpec, runs: tuple[Run, ...], tensors: dict[str, Tensor]) -> Iterator[Mask]:
    """Yield the mask of each run."""
    laying, mask, order = laying_of(tensors), tensors["mask"], tensors.get("order")
    by_rows, first = spec.width_axis == "output", 0
    patterns = None if spec.n_m is None else _patterns(spec, mask, None, laying)
    for run in runs:
        if patterns is not None:
            channels = members(order, run)
            yield Mask(patterns[channels] if by_rows else patterns[:, channels], False)
            continue
        rows, columns = (run.channels, spec.shape[1]) if by_rows else (spec.shape[0], run.channels)
        each = laying.size(columns, 1)
        yield Mask(mask[first : first + rows * each].view(rows, each), True)
        first += rows * each


def stream_of(runs: tuple[Run, ...], run: Run, stream: Tensor) -> Tensor:
    """Return the survivors of a run as they lie."""
    ends = [other.start for other in runs if other.first > run.first]
    return stream[run.start : ends[0] if ends else None]
