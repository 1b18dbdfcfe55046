"""Whole matrices out of bytes in few passes, for products on a CPU; bit for bit what `Solution.weight` returns.

A product on a CPU needs the whole float32 matrix, or its sums would be made in another order than the dense model's.
Each pass over it costs a twentieth to a third of a product with a dense matrix that comes from RAM (0.2 to 0.4 ns a
weight on one core): so there are few, in place, none with an index to each weight but where there is a mask.

A masked weight is found by its number among the survivors: those of a byte of the mask start where the counts of the
bytes before add up to, and within the byte a count runs from bit to bit. Then a table per row has the value of each
code, and zero for what was removed.

Weights that are laid in words, or neither quantized nor masked, are left to others.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from sgpt_lightning.core.grids import Grid, Scale
from sgpt_lightning.format.fields import block_of, set_values_apart
from sgpt_lightning.format.layings import BYTE, BYTES, bits_of, laying_of, lift_bytes
from sgpt_lightning.format.layout import WeightSpec
from sgpt_lightning.format.planes import Run
from sgpt_lightning.format.survivors import Mask, kept_of, stream_of

_AT_ONCE = 1 << 20
"""Weights that are done at once: what lies between the passes then takes 20 MB at most, and stays in a shared cache."""
_TABLE_BITS = 6
"""Widest codes whose values a table per row holds."""


def unpack_on_cpu(spec: WeightSpec, runs: tuple[Run, ...], tensors: dict[str, Tensor]) -> Tensor | None:
    """Return the matrix, float32 `[out_features, in_features]`, or None where it is not of a kind that is known here.

    Args:
        spec: of the weight.
        runs: its runs.
        tensors: of `Resident`, floats as such.
    """
    if laying_of(tensors) is not BYTES:
        return None
    if spec.layout == "coded":
        return _coded(spec, runs, tensors)
    if "values" in tensors:
        return _pruned(spec, runs, tensors)
    dim = 0 if spec.width_axis == "output" else 1
    weight = torch.empty(spec.shape, dtype=torch.float32, device=tensors["bytes"].device)
    masks = None if spec.layout == "dense" else kept_of(spec, runs, tensors)
    for number, run in enumerate(runs):
        part, scale = weight.narrow(dim, run.first, run.channels), _scale(spec, runs, number, tensors)
        if masks is not None:
            _fill(part, next(masks), run.bits, stream_of(runs, run, tensors["bytes"]), scale)
            continue
        laid = block_of(spec, run, tensors["bytes"], BYTES)
        for rows in _some_rows(*part.shape):
            part[rows] = lift_bytes(laid[rows], run.bits, part.shape[1])
            _of_rows(scale, rows).dequantize_(part[rows])
    ordered, factors = _in_order(weight, tensors.get("order"), dim), tensors.get("channel_scale")
    return ordered if factors is None else ordered.mul_(factors.float())


def _some_rows(rows: int, columns: int) -> list[slice]:
    """Return the rows that are done at once."""
    some = max(_AT_ONCE // columns, 1)
    return [slice(first, first + some) for first in range(0, rows, some)]


def _of_rows(scale: Scale, rows: slice) -> Scale:
    return scale._replace(step=scale.step[rows], base=scale.base[rows])


def _coded(spec: WeightSpec, runs: tuple[Run, ...], tensors: dict[str, Tensor]) -> Tensor:
    weight = torch.empty(spec.shape, dtype=torch.float32, device=tensors["bytes"].device)
    blocks = [block_of(spec, run, tensors["bytes"], BYTES) for run in runs]
    for rows in _some_rows(*spec.shape):
        for run, laid in zip(runs, blocks, strict=True):
            codes = lift_bytes(laid[rows], run.bits, run.channels).sub_(1 << (run.bits - 1))
            # Bytes wrap around, to the two's complement of what is below zero.
            signed = codes.view(torch.int8) if codes.dtype == torch.uint8 else codes
            weight[rows, run.first : run.first + run.channels] = signed
        weight[rows].mul_(tensors["column_factors"]).mul_(tensors["row_factors"][rows, None])
    return set_values_apart(_in_order(weight, tensors.get("order"), 1), tensors)


def _pruned(spec: WeightSpec, runs: tuple[Run, ...], tensors: dict[str, Tensor]) -> Tensor:
    weight = torch.empty(spec.shape, dtype=torch.float32, device=tensors["values"].device)
    mask = next(kept_of(spec, runs, tensors))
    for rows, keep, found in _spread(tensors["values"].float(), mask, spec.shape):
        _put(weight[rows], _zeroed(found, keep))
    return weight


def _in_order(weight: Tensor, order: Tensor | None, dim: int) -> Tensor:
    """Bring channels back from the order of the runs."""
    if order is None:
        return weight
    places = torch.empty(len(order), dtype=torch.int64, device=weight.device)
    places[order.long()] = torch.arange(len(order), device=weight.device)
    return weight.index_select(dim, places)


def _scale(spec: WeightSpec, runs: tuple[Run, ...], number: int, tensors: dict[str, Tensor]) -> Scale:
    """Return what codes of a run stand for; step and base are `[rows, 1]`, or `[rows, columns]` in groups."""
    assert spec.grid is not None
    assert spec.widths is not None
    run, order = runs[number], tensors.get("order")
    channels = slice(None) if order is None else order[run.first : run.first + run.channels].long()
    by_rows = spec.width_axis == "output"
    rows = channels if by_rows else slice(None)
    span, origin = tensors["span"][rows], tensors["origin"][rows]
    grid = Grid(spec.grid, span, origin, spec.widths[-1], spec.group_size, spec.width_axis)
    if spec.group_size is not None:
        scale = grid.at(run.bits)
        wide = (part.repeat_interleave(spec.group_size, 1)[:, : spec.shape[1]] for part in (scale.step, scale.base))
        step, base = (part if by_rows else part[:, channels] for part in wide)
        return scale._replace(step=step, base=base)
    # Without groups, columns of one width are a segment, narrowest first.
    segment = 0 if by_rows or spec.grid == "zero-point" else len(runs) - 1 - number
    return grid.at(run.bits, slice(segment, segment + 1))


def _fill(part: Tensor, mask: Mask, bits: int, stream: Tensor, scale: Scale) -> None:
    """Put the survivors of a run into their places, zero elsewhere.

    Args:
        part: float32 `[rows, columns]`.
        mask: where they are.
        bits: of their codes.
        stream: the codes as they lie.
        scale: what they stand for.
    """
    columns = part.shape[1]
    stored = BYTES.lift_stream(stream, bits, len(stream) // bits * BYTE)
    table = None if bits > _TABLE_BITS or scale.step.shape[1] > 1 else _table(bits, scale)
    for rows, keep, codes in _spread(stored, mask, (len(part), columns)):
        if table is not None:
            _put(part[rows], _looked_up(table[rows], codes, keep))
            continue
        values = _of_rows(scale, rows).dequantize_(_by_rows(codes, columns).float())
        part[rows] = _zeroed(values, _by_rows(keep, columns))


def _spread(stored: Tensor, mask: Mask, shape: tuple[int, int]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield rows, a 1 for each survivor in them, and the survivors in their places, another one in those of others.

    Args:
        stored: the survivors, one behind the other.
        mask: where they are.
        shape: (rows, columns).
    """
    stored = pad(stored, (0, 1))  # for what is behind the last
    first = 0
    for rows in _some_rows(*shape):
        keep, numbers = (_planes if mask.of_bits else _plane)(mask.kept[rows])
        found = stored.index_select(0, numbers.add_(first).view(-1)).view(keep.shape)
        first = int(numbers[-1, -1, -1]) + int(keep[-1, -1, -1])
        yield rows, keep, found


def _zeroed(values: Tensor, keep: Tensor) -> Tensor:
    """Set float32 values to zero where `keep` is 0, in place: by their bits, as branches on a random mask are slow."""
    values.view(torch.int32).bitwise_and_(keep.int().neg_())
    return values


def _planes(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Take the bits of a mask apart, so that all that is done to a bit of each byte is done to neighbours.

    Args:
        mask: uint8 `[rows, bytes]`; survivors lie byte by byte, within a byte from the lowest bit up.

    Returns:
        1 for each survivor, uint8 `[8, rows, bytes]`, and the number of each weight, or of the next one that survives,
        among the survivors, int32 like it.
    """
    keep = bits_of(mask)
    before = torch.empty_like(keep)  # in its byte
    before[0] = 0
    for bit in range(1, BYTE):
        torch.add(before[bit - 1], keep[bit - 1], out=before[bit])
    counts = before[-1] + keep[-1]
    starts = counts.view(-1).cumsum(0, dtype=torch.int32).view(counts.shape) - counts
    return keep, before.int().add_(starts)


def _plane(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Do the same for a mask that is not in bits, bool `[rows, columns]`; `[1, rows, columns]`."""
    keep = kept.to(torch.uint8)
    return keep[None], keep.view(-1).cumsum(0, dtype=torch.int32).sub_(keep.view(-1)).view(keep.shape)[None]


def _put(part: Tensor, planes: Tensor) -> None:
    """Copy `[8, rows, bytes]`, or `[1, rows, columns]`, to `[rows, columns]`."""
    if part.shape[1] == len(planes) * planes.shape[2]:
        part.unflatten(1, (len(planes), -1)).copy_(planes.transpose(0, 1))
    else:
        part.copy_(_by_rows(planes, part.shape[1]))


def _by_rows(planes: Tensor, columns: int) -> Tensor:
    """Return `[8, rows, bytes]`, or `[1, rows, columns]`, as `[rows, columns]`."""
    return planes.transpose(0, 1).flatten(1)[:, :columns]


def _table(bits: int, scale: Scale) -> Tensor:
    """Return the value of each code in each row, and as many zeros behind them, float32 `[rows, 2^(bits + 1)]`."""
    every = torch.arange(1 << bits, device=scale.step.device, dtype=torch.float32)
    return pad(scale.dequantize(every.expand(len(scale.step), -1)), (0, 1 << bits))


def _looked_up(table: Tensor, codes: Tensor, keep: Tensor) -> Tensor:
    """Return the values of codes, zero where `keep` is 0, float32; both are of one shape, uint8, and go."""
    codes.bitwise_or_(keep.bitwise_xor_(1).mul_(table.shape[1] // 2))
    firsts = torch.arange(0, table.numel(), table.shape[1], device=codes.device, dtype=torch.int32)
    return table.reshape(-1).index_select(0, codes.int().add_(firsts[:, None]).view(-1)).view(codes.shape)
