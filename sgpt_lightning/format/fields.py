"""Weights without a mask in memory: codes as fields. `resident.py` says what the tensors hold."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sgpt_lightning.core.grids import Grid
from sgpt_lightning.core.solution import ROW_OCTAVE, Coded, Quantized, power_of_two
from sgpt_lightning.format.layings import BYTES, Laying, laying_of
from sgpt_lightning.format.layout import PackedWeight, WeightSpec, origin_name
from sgpt_lightning.format.planes import Run

APART_TILE = 16
"""Rows to a number in `apart_tiles`."""
_PRICE_APART = 128
"""What a code apart counts, in bits, when widths are chosen: 64 in memory, and as much again for a kernel's trouble."""
_WORTH_TWO_WIDTHS = 0.8
"""Of the price of one width, on a CPU: to bring columns into their order is a third of all its work. On opt-small at 3
bits one width takes 2 % more memory. Kernels have the order for little."""


def of_quantized(
    solution: Quantized, packed: PackedWeight, laying: Laying
) -> tuple[tuple[Run, ...], dict[str, Tensor]]:
    """Lay out a quantized matrix without a mask."""
    by_rows = solution.grid.axis == "output"
    runs, order = runs_of(solution.widths, solution.shape, by_rows, laying)
    laid = []
    for run in runs:
        channels = members(order, run)
        codes = solution.codes[channels] if by_rows else solution.codes[:, channels]
        laid.append(laying.lay(codes, run.bits).view(-1))
    return runs, {laying.name: torch.cat(laid)} | grid_tensors(packed) | order_tensor(order)


def runs_of(
    widths: Tensor, shape: tuple[int, int], by_rows: bool, laying: Laying
) -> tuple[tuple[Run, ...], Tensor | None]:
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
        start += count * laying.size(shape[1], bits) if by_rows else shape[0] * laying.size(count, bits)
    return tuple(runs), order if len(runs) > 1 else None


def members(order: Tensor | None, run: Run) -> Tensor | slice:
    """Return the channels of a run, in its order."""
    return slice(None) if order is None else order[run.first : run.first + run.channels].long()


def order_tensor(order: Tensor | None) -> dict[str, Tensor]:
    """Return the order as it is kept."""
    return {} if order is None else {"order": order.to(torch.int16 if len(order) <= 1 << 15 else torch.int32)}


def _grid_names(spec: WeightSpec) -> dict[str, str]:
    """Return the tensors that stand beside the codes of a quantized matrix: name here -> name in a file."""
    same = {name: f"weight_{name}" for name in ("widths", "channel_scale")}
    return {"span": "weight_range", "origin": origin_name(spec), **same}


def grid_tensors(packed: PackedWeight) -> dict[str, Tensor]:
    """Return what stands beside the codes of a quantized matrix."""
    names = _grid_names(packed.spec)
    return {name: packed.tensors[stored] for name, stored in names.items() if stored in packed.tensors}


def grid_in_file(spec: WeightSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what `grid_tensors` returned under the names that it has in a file."""
    return {stored: tensors[name] for name, stored in _grid_names(spec).items() if name in tensors}


def of_coded(solution: Coded, laying: Laying) -> tuple[tuple[Run, ...], dict[str, Tensor]]:
    """Lay out a coded matrix in the bits that save memory, codes beyond them apart.

    There is one width for all input channels, or there are two: each more is a launch of a kernel, and saves next to
    nothing where codes may be apart.
    """
    codes = solution.codes
    rows, columns = solution.shape
    bits = _cheapest_bits(codes, _WORTH_TWO_WIDTHS if laying is BYTES else 1.0)
    runs, order = runs_of(bits, (rows, columns), False, laying)
    laid, apart = [], []
    for run in runs:
        run_codes = codes[:, members(order, run)]
        beyond = _magnitude(run_codes) >> (run.bits - 1) != 0
        row, column = beyond.nonzero(as_tuple=True)
        apart.append((row * columns + column + run.first, run_codes[row, column]))
        laid.append(laying.lay(run_codes.masked_fill(beyond, 0) + (1 << (run.bits - 1)), run.bits).view(-1))
    at, sorting = torch.cat([places for places, _ in apart]).sort()
    tiles = torch.arange(-(-rows // APART_TILE) + 1, device=codes.device) * (APART_TILE * columns)
    steps, row_factors = solution.step_sizes(), power_of_two(solution.rows, ROW_OCTAVE)
    tensors = {
        laying.name: torch.cat(laid), "level": solution.level, "steps": solution.steps, "row_scales": solution.rows,
        "column_factors": steps if order is None else steps[order], "row_factors": row_factors,
        "apart_at": at.int() if rows * columns < 1 << 31 else at,
        "apart": torch.cat([values for _, values in apart])[sorting],
        "apart_tiles": torch.searchsorted(at, tiles).int(),
    }  # fmt: skip
    return runs, tensors | order_tensor(order)


def _magnitude(codes: Tensor) -> Tensor:
    """Return k for k >= 0 and -k - 1 below: what has to fit into one bit less than the field."""
    return codes ^ (codes >> 31)


def _cheapest_bits(codes: Tensor, worth: float) -> Tensor:
    """Return the bits of each column, int64 `[in_features]`: those two widths at which all take least.

    Args:
        codes: int32 `[out_features, in_features]`.
        worth: fraction of the price of one width that two may cost, or there is one.
    """
    rows, columns = codes.shape
    # The exponent of a whole number of up to 24 bits is its length, less 1.
    lengths = ((_magnitude(codes).float().view(torch.int32) >> 23) - 126).clamp_(min=0)
    counted = torch.bincount((lengths + _LENGTHS * torch.arange(columns, device=codes.device).int()).view(-1))
    counts = torch.nn.functional.pad(counted, (0, columns * _LENGTHS - len(counted))).view(columns, _LENGTHS).T
    widest = int(counts.sum(1).nonzero().max()) + 1
    bits = torch.arange(1, widest + 1, device=codes.device)
    beyond = rows - counts.cumsum(0)[:widest]  # longer than the width less its sign
    prices = rows * bits[:, None] + _PRICE_APART * beyond
    # The best partner of each width, from all pairs at once.
    pairs = torch.stack([torch.minimum(prices, price).sum(1) for price in prices])
    one, other = divmod(int(pairs.argmin()), widest)
    alone = prices.sum(1)
    if pairs.min() > worth * alone.min():
        return bits[alone.argmin()].expand(columns)
    return torch.where(prices[one] <= prices[other], bits[one], bits[other])


_LENGTHS = 25
"""Bits that a magnitude has: from none to those of a float's whole numbers."""


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
    widths = torch.empty(spec.shape[0 if by_rows else 1], dtype=torch.uint8, device=tensors["span"].device)
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
    laying = laying_of(tensors)
    laid = tensors[laying.name]
    rows = spec.shape[0] if index is None else len(index)
    codes = torch.empty(rows, spec.shape[1], dtype=dtype, device=laid.device)
    order = tensors.get("order")
    for run in runs:
        channels = members(order, run)
        block = block_of(spec, run, laid, laying)
        if spec.width_axis == "output":
            here, place = rows_of_run(order, run, index)
            codes[here] = laying.lift(block[place], run.bits, spec.shape[1]).to(dtype)
            continue
        found = laying.lift(block if index is None else block[index], run.bits, run.channels).to(dtype)
        codes[:, channels] = found if spec.layout != "coded" else found.sub_(1 << (run.bits - 1))
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


def block_of(spec: WeightSpec, run: Run, laid: Tensor, laying: Laying) -> Tensor:
    """Return the rows of a run as they lie, `[rows, laying.size]`."""
    rows, count = (run.channels, spec.shape[1]) if spec.width_axis == "output" else (spec.shape[0], run.channels)
    each = laying.size(count, run.bits)
    return laid[run.start : run.start + rows * each].view(rows, each)


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


def set_values_apart(weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Put the values of codes that are apart into a matrix, `[out_features, in_features]`, in place; return it."""
    at, columns = tensors["apart_at"], weight.shape[1]
    row = at // columns
    place = at - row * columns
    factors = (tensors[name].index_select(0, of) for name, of in (("column_factors", place), ("row_factors", row)))
    value = tensors["apart"].float()
    for factor in factors:
        value *= factor
    if "order" in tensors:
        at = row * columns + tensors["order"][place.long()]
    weight.view(-1).index_copy_(0, at.long(), value.to(weight.dtype))
    return weight
