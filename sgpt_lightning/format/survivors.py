"""Masked weights in memory: masks, and survivors behind them. `resident.py` says what the tensors hold."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.core.solution import Pruned, Quantized
from sgpt_lightning.format.bits import pack_bits, packed_bytes, unpack_bits
from sgpt_lightning.format.fields import grid_tensors, members, order_tensor, rows_of_run, runs_of, widths_and_grid
from sgpt_lightning.format.layout import PackedWeight, WeightSpec
from sgpt_lightning.format.masks import rank_bits, zero_patterns, zero_ranks
from sgpt_lightning.format.planes import LANE, Run, lane_order, lay_fields, lift_fields


class _Part(NamedTuple):
    """A run, and where its survivors and their mask are."""

    run: Run
    rows: Tensor | slice
    """Its rows."""
    columns: Tensor
    """Its columns in the order in which survivors lie, int64."""
    height: int
    """Number of rows."""
    before: int
    """Rows of the runs before it."""
    mask: int
    """Its first word of the bitmap."""

    @property
    def words(self) -> int:
        """Words of the bitmap that a row takes."""
        return -(-len(self.columns) // LANE)


def _parts(spec: WeightSpec, runs: tuple[Run, ...], order: Tensor | None, device: torch.device) -> Iterator[_Part]:
    by_rows, before, mask = spec.width_axis == "output", 0, 0
    for run in runs:
        channels, columns = members(order, run), torch.arange(spec.shape[1], device=device)
        columns = columns if by_rows else columns[channels]
        columns = columns if spec.n_m is not None else columns[lane_order(len(columns), device)]
        height = run.channels if by_rows else spec.shape[0]
        yield (part := _Part(run, channels if by_rows else slice(None), columns, height, before, mask))
        before, mask = before + height, mask + height * part.words


def of_masked(solution: Pruned | Quantized, packed: PackedWeight) -> tuple[tuple[Run, ...], dict[str, Tensor]]:
    """Lay out the survivors of a mask."""
    spec, keep = packed.spec, solution.keep
    assert keep is not None
    if isinstance(solution, Quantized):
        name, values, widths, beside = "words", solution.codes, solution.widths, grid_tensors(packed)
    else:
        name, values, widths, beside = "values", solution.values, keep.new_zeros(spec.shape[1]), {}
    sorted_runs, order = runs_of(widths, spec.shape, spec.width_axis == "output")
    runs, masks, starts = [], [], []
    streams: list[Tensor] = []
    for part in _parts(spec, sorted_runs, order, keep.device):
        kept = keep[part.rows][:, part.columns]
        counts = kept.sum(1)
        masks.append(_mask_words(kept))
        starts.append((counts.cumsum(0) - counts).int())
        runs.append(part.run._replace(start=sum(len(stream) for stream in streams)))
        survivors = values[part.rows][:, part.columns][kept]
        streams.append(survivors if name == "values" else _words(pack_bits(survivors, part.run.bits)))
    tensors = {name: torch.cat(streams), "mask": torch.cat(masks)} | order_tensor(order)
    if spec.n_m is not None:
        ranks = zero_ranks(keep, spec.n_m).view(spec.shape[0], -1)
        tensors["mask"] = lay_fields(ranks, rank_bits(spec.n_m)).view(-1)
    if spec.n_m is None or len(runs) > 1:
        tensors["starts"] = torch.cat(starts)
    return tuple(runs), tensors | beside


def _mask_words(kept: Tensor) -> Tensor:
    """Return a bit a weight, each row from a word on."""
    return pack_bits(torch.nn.functional.pad(kept, (0, -kept.shape[1] % LANE)), 1).view(torch.int32)


def _words(packed: Tensor) -> Tensor:
    return torch.nn.functional.pad(packed, (0, -packed.numel() % 4)).view(torch.int32)


def read(
    spec: WeightSpec, runs: tuple[Run, ...], tensors: dict[str, Tensor], index: Tensor | None
) -> Pruned | Quantized:
    """Read all rows of a matrix, or those of an index, int64 `[n]`."""
    stream = tensors["values" if spec.widths is None else "words"]
    order, by_rows = tensors.get("order"), spec.width_axis == "output"
    rows = spec.shape[0] if index is None else len(index)
    keep = torch.zeros(rows, spec.shape[1], dtype=torch.bool, device=stream.device)
    values = torch.zeros(keep.shape, dtype=stream.dtype if spec.widths is None else torch.uint8, device=stream.device)
    patterns = None if spec.n_m is None else _patterns(spec, tensors["mask"], index)
    for part in _parts(spec, runs, order, stream.device):
        here, place = rows_of_run(order if by_rows else None, part.run, index)
        kept = _kept(part, tensors["mask"], place) if patterns is None else patterns[here][:, part.columns]
        if index is None:
            found = _all(stream, part.run, int(kept.sum()))
        else:
            numbers = kept.cumsum(1) - 1 + _starts(spec, tensors, part.before, place)[:, None]
            found = _some(stream, part.run, numbers[kept])
        spread = torch.zeros(kept.shape, dtype=values.dtype, device=kept.device).masked_scatter_(kept, found)
        _put(values, spread, here, part.columns)
        _put(keep, kept, here, part.columns)
    if spec.widths is None:
        return Pruned(values, keep, spec.n_m)
    scale = tensors.get("channel_scale")
    return Quantized(values, *widths_and_grid(spec, runs, tensors, index), keep, spec.n_m, scale)


def _kept(part: _Part, mask: Tensor, rows: Tensor | slice) -> Tensor:
    """Return the mask of some rows of a run, in the order of its survivors."""
    words = mask[part.mask : part.mask + part.height * part.words].view(part.height, part.words)[rows]
    bits = unpack_bits(words.reshape(-1).view(torch.uint8), 1, words.numel() * LANE).bool()
    return bits.view(-1, part.words * LANE)[:, : len(part.columns)]


def _put(matrix: Tensor, part: Tensor, rows: Tensor | slice, columns: Tensor) -> None:
    if isinstance(rows, Tensor):
        matrix[rows[:, None], columns] = part
    else:
        matrix[:, columns] = part


def _patterns(spec: WeightSpec, mask: Tensor, index: Tensor | None) -> Tensor:
    """Return the mask of some rows, by their ranks."""
    assert spec.n_m is not None
    words, groups = mask.view(spec.shape[0], -1), spec.shape[1] // spec.n_m[1]
    ranks = lift_fields(words if index is None else words[index], rank_bits(spec.n_m), groups)
    return zero_patterns(*spec.n_m).to(mask.device)[ranks.long()].flatten(1)


def _starts(spec: WeightSpec, tensors: dict[str, Tensor], first: int, rows: Tensor | slice) -> Tensor:
    """Return how many survivors lie before some rows of a run, int64."""
    if "starts" in tensors:
        return tensors["starts"][first:][rows].long()
    assert spec.n_m is not None
    assert isinstance(rows, Tensor)
    return rows * (spec.shape[1] // spec.n_m[1] * (spec.n_m[1] - spec.n_m[0]))


def _all(stream: Tensor, run: Run, count: int) -> Tensor:
    """Return all survivors of a run."""
    if stream.is_floating_point():
        return stream
    size = packed_bytes(count, run.bits)
    return unpack_bits(stream[run.start :].view(torch.uint8)[:size], run.bits, count)


def _some(stream: Tensor, run: Run, numbers: Tensor) -> Tensor:
    """Return survivors of a run by their numbers, int64."""
    if stream.is_floating_point():
        return stream[numbers]
    at = numbers * run.bits
    word = run.start + (at >> 5)
    low, high = (stream[place.clamp(max=len(stream) - 1)].long() & 0xFFFFFFFF for place in (word, word + 1))
    return ((low | high << 32) >> (at & 31) & ((1 << run.bits) - 1)).to(torch.uint8)
