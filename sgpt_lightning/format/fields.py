"""Weights without a mask in memory: codes as fields of words. `resident.py` says what the tensors hold."""

import torch
from torch import Tensor

from sgpt_lightning.core.grids import Grid
from sgpt_lightning.core.solution import ROW_OCTAVE, Coded, Quantized, power_of_two
from sgpt_lightning.format.layout import PackedWeight, WeightSpec, origin_name
from sgpt_lightning.format.planes import Run, lay_fields, lift_fields, row_words

APART_TILE = 16
"""Rows to a number in `apart_tiles`."""
_PRICE_APART = 128
"""What a code apart counts, in bits, when widths are chosen: 64 in memory, and as much again for a kernel's trouble."""


def of_quantized(solution: Quantized, packed: PackedWeight) -> tuple[tuple[Run, ...], dict[str, Tensor]]:
    """Lay out a quantized matrix without a mask."""
    by_rows = solution.grid.axis == "output"
    runs, order = runs_of(solution.widths, solution.shape, by_rows)
    words = []
    for run in runs:
        channels = members(order, run)
        codes = solution.codes[channels] if by_rows else solution.codes[:, channels]
        words.append(lay_fields(codes, run.bits).view(-1))
    return runs, {"words": torch.cat(words)} | grid_tensors(packed) | order_tensor(order)


def runs_of(widths: Tensor, shape: tuple[int, int], by_rows: bool) -> tuple[tuple[Run, ...], Tensor | None]:
    """Sort channels by their widths, the widest first.

    Returns:
        The runs, and the channels in their order, int64, or None where one run has them all in their own order.
    """
    order = torch.argsort(widths.short(), descending=True, stable=True)
    used, counts = torch.unique_consecutive(widths[order], return_counts=True)
    runs, first, start = [], 0, 0
    for bits, count in zip(used.tolist(), counts.tolist(), strict=True):
        runs.append(Run(bits, first, count, start))
        first += count
        start += count * row_words(shape[1], bits) if by_rows else shape[0] * row_words(count, bits)
    return tuple(runs), order if len(runs) > 1 else None


def members(order: Tensor | None, run: Run) -> Tensor | slice:
    """Return the channels of a run, in its order."""
    return slice(None) if order is None else order[run.first : run.first + run.channels].long()


def order_tensor(order: Tensor | None) -> dict[str, Tensor]:
    """Return the order as it is kept."""
    return {} if order is None else {"order": order.to(torch.int16 if len(order) <= 1 << 15 else torch.int32)}


def grid_tensors(packed: PackedWeight) -> dict[str, Tensor]:
    """Return what stands beside the codes of a quantized matrix."""
    spec, tensors = packed
    beside = {"span": tensors["weight_range"], "origin": tensors[origin_name(spec)]}
    some = {name: tensors.get(f"weight_{name}") for name in ("widths", "channel_scale")}
    return beside | {name: tensor for name, tensor in some.items() if tensor is not None}


def of_coded(solution: Coded) -> tuple[tuple[Run, ...], dict[str, Tensor]]:
    """Lay out a coded matrix in the bits per input channel that save memory, codes beyond them apart.

    There are two widths at most: each more is a launch of a kernel, and saves next to nothing where codes may be apart.
    """
    codes = solution.codes
    rows, columns = solution.shape
    runs, order = runs_of(_cheapest_bits(codes), (rows, columns), False)
    words, apart = [], []
    for run in runs:
        run_codes = codes[:, members(order, run)]
        beyond = _magnitude(run_codes) >> (run.bits - 1) != 0
        row, column = beyond.nonzero(as_tuple=True)
        apart.append((row * columns + column + run.first, run_codes[row, column]))
        words.append(lay_fields(run_codes.masked_fill(beyond, 0) + (1 << (run.bits - 1)), run.bits).view(-1))
    at, sorting = torch.cat([places for places, _ in apart]).sort()
    tiles = torch.arange(-(-rows // APART_TILE) + 1, device=codes.device) * (APART_TILE * columns)
    steps, row_factors = solution.step_sizes(), power_of_two(solution.rows, ROW_OCTAVE)
    tensors = {
        "words": torch.cat(words), "level": solution.level, "steps": solution.steps, "row_scales": solution.rows,
        "column_factors": steps if order is None else steps[order], "row_factors": row_factors,
        "apart_at": at.int() if rows * columns < 1 << 31 else at,
        "apart": torch.cat([values for _, values in apart])[sorting],
        "apart_tiles": torch.searchsorted(at, tiles).int(),
    }  # fmt: skip
    return runs, tensors | order_tensor(order)


def _magnitude(codes: Tensor) -> Tensor:
    """Return k for k >= 0 and -k - 1 below: what has to fit into one bit less than the field."""
    return codes ^ (codes >> 31)


def _cheapest_bits(codes: Tensor) -> Tensor:
    """Return the bits of each column, int64 `[in_features]`: of the two widths at which all take least."""
    magnitude = _magnitude(codes)
    widest = int(magnitude.max()).bit_length() + 1
    bits = torch.arange(1, widest + 1, device=codes.device)
    beyond = torch.stack([(magnitude >> (b - 1) != 0).sum(0) for b in range(1, widest)] + [torch.zeros_like(codes[0])])
    prices = len(codes) * bits[:, None] + _PRICE_APART * beyond
    # The best partner of each width, from all pairs at once.
    pairs = torch.stack([torch.minimum(prices, price).sum(1) for price in prices])
    one, other = divmod(int(pairs.argmin()), widest)
    return torch.where(prices[one] <= prices[other], bits[one], bits[other])


def read(
    spec: WeightSpec, runs: tuple[Run, ...], tensors: dict[str, Tensor], index: Tensor | None
) -> Coded | Quantized:
    """Read all rows of a matrix, or those of an index, int64 `[n]`."""
    if spec.layout == "coded":
        codes = _codes(spec, runs, tensors, index, torch.int32)
        row_scales = tensors["row_scales"] if index is None else tensors["row_scales"][index]
        return Coded(codes, tensors["level"], tensors["steps"], row_scales)
    codes = _codes(spec, runs, tensors, index, torch.uint8)
    return Quantized(codes, *widths_and_grid(spec, runs, tensors, index), channel_scale=tensors.get("channel_scale"))


def widths_and_grid(
    spec: WeightSpec, runs: tuple[Run, ...], tensors: dict[str, Tensor], index: Tensor | None
) -> tuple[Tensor, Grid]:
    """Return the width of each channel and the grid of the rows of an index."""
    assert spec.grid is not None
    assert spec.widths is not None
    by_rows = spec.width_axis == "output"
    widths = torch.empty(spec.shape[0 if by_rows else 1], dtype=torch.uint8, device=tensors["words"].device)
    for run in runs:
        widths[members(tensors.get("order"), run)] = run.bits
    span, origin = tensors["span"], tensors["origin"]
    if index is not None:
        span, origin, widths = span[index], origin[index], widths[index] if by_rows else widths
    return widths, Grid(spec.grid, span, origin, spec.widths[-1], spec.group_size, spec.width_axis)


def _codes(
    spec: WeightSpec, runs: tuple[Run, ...], tensors: dict[str, Tensor], index: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the codes of some rows, `[n, in_features]`."""
    rows = spec.shape[0] if index is None else len(index)
    codes = torch.empty(rows, spec.shape[1], dtype=dtype, device=tensors["words"].device)
    order = tensors.get("order")
    for run in runs:
        channels = members(order, run)
        if spec.width_axis == "output":
            here, place = rows_of_run(order, run, index)
            block = _block(tensors["words"], run, run.channels, spec.shape[1])[place]
            codes[here] = lift_fields(block, run.bits, spec.shape[1]).to(dtype)
            continue
        block = _block(tensors["words"], run, spec.shape[0], run.channels)
        found = lift_fields(block if index is None else block[index], run.bits, run.channels)
        codes[:, channels] = (found if spec.layout != "coded" else found.sub_(1 << (run.bits - 1))).to(dtype)
    if spec.layout == "coded":
        _set_apart(codes, tensors, index)
    return codes


def rows_of_run(order: Tensor | None, run: Run, index: Tensor | None) -> tuple[Tensor | slice, Tensor | slice]:
    """Return which of the rows asked for are in a run of rows, and where they are in it."""
    if index is None:
        return members(order, run), slice(None)
    if order is None:
        return slice(None), index
    asked = torch.argsort(order)[index] - run.first
    here = ((asked >= 0) & (asked < run.channels)).nonzero().view(-1)
    return here, asked[here]


def _block(words: Tensor, run: Run, rows: int, count: int) -> Tensor:
    """Return the words of a run, `[rows, row_words]`."""
    each = row_words(count, run.bits)
    return words[run.start : run.start + rows * each].view(rows, each)


def _set_apart(codes: Tensor, tensors: dict[str, Tensor], index: Tensor | None) -> None:
    """Put the codes that are apart into their places, int32 `[n, in_features]`."""
    at, columns, order = tensors["apart_at"], codes.shape[1], tensors.get("order")
    if index is None:
        row, place, values = at.long() // columns, at.long() % columns, tensors["apart"]
    else:
        first, last = torch.searchsorted(at.long(), torch.stack([index, index + 1]) * columns)
        row = torch.repeat_interleave(last - first)
        entry = torch.arange(len(row), device=at.device) - (last - first).cumsum(0)[row] + last[row]
        place, values = at[entry].long() % columns, tensors["apart"][entry]
    codes[row, place if order is None else order[place].long()] = values
