"""Where the levels of a row should lie: search before the sweep, closed form after it.

Both are about the grids whose origin is a real number (`offset`, `zero-free`): a value is
q = sign * (origin + span * u) with u = k / T in [0, 1], so that origin and span enter linearly once codes are known.

- `search_grid` minimises sum_j H_jj (q_j - w_j)^2 over the survivors of a row and segment: first over a lattice of
  shrunken intervals, then by alternating codes and weighted regression (Lloyd's algorithm). Weighting matters: without
  H_jj the search is worse than minimum and maximum.
- `refit_grid` takes the codes that a sweep has chosen and solves for origin and span under the whole objective
  tr((T - Q) H (T - Q)'): two unknowns per row and segment, one segment after the other. A row changes only if its
  error falls, after rounding to the precision of the file.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.core.grids import Grid, GridKind, WidthAxis, dequantize_matrix, stored_dtype, top_step

LOW_SHRINKS = (0.0, 0.04, 0.08, 0.12, 0.18, 0.25)
HIGH_SHRINKS = (0.0, 0.06, 0.12, 0.18, 0.25, 0.32, 0.4, 0.5)
REGRESSIONS = 6
_LEAST_SPAN = 1e-3


def search_grid(
    kind: GridKind,
    weight: Tensor,
    importance: Tensor,
    widths: Tensor,
    *,
    axis: WidthAxis = "input",
    group_size: int | None = None,
    search: bool = True,
) -> Grid:
    """Fit spans and origins to a matrix.

    Args:
        kind: `offset` or `zero-free`.
        weight: float32 `[out_features, in_features]`; for `zero-free`, entries that are zero are left out.
        importance: what a squared error costs per column, `[in_features]`, or per entry.
        widths: bits per column, uint8 `[in_features]`, or per row, uint8 `[out_features]`.
        axis: which of the two `widths` are.
        group_size: columns per segment, or None, see `grids.py`.
        search: False takes minimum and maximum.

    Returns:
        A grid whose span and origin are float16 where that holds them.
    """
    values = weight.abs() if kind == "zero-free" else weight
    cost = importance.expand_as(weight)
    counted = weight != 0 if kind == "zero-free" else torch.ones_like(weight, dtype=torch.bool)
    tops = torch.tensor([0, *(max(top_step(kind, bits), 1) for bits in range(1, 9))], device=weight.device)
    top = tops[widths.long()].float()
    clip = torch.where(widths.long() == 1, 0.0, top) if kind == "zero-free" else top
    top, clip = (t[:, None] if axis == "output" else t[None] for t in (top, clip))
    cost = cost * counted

    def of_segment(chosen: slice | Tensor) -> _Segment:
        tops, clips = (t if axis == "output" else t[:, chosen] for t in (top, clip))
        if group_size is None:  # a segment has one width, or each row has
            tops, clips = tops[:, :1], clips[:, :1]
        return _Segment(values[:, chosen], cost[:, chosen], tops, clips, 0.0 if kind == "zero-free" else -math.inf)

    columns = _columns_of_segments(axis, widths, weight.shape[1], group_size)
    found = [_search_segment(of_segment(chosen), search) for chosen in columns]
    origin, span = (torch.stack(parts, 1) for parts in zip(*found, strict=True))
    span = _raised(span)
    dtype = stored_dtype(span, origin)
    return Grid(kind, span.to(dtype), origin.to(dtype), int(widths.max()), group_size, axis)


def _raised(span: Tensor) -> Tensor:
    """Raise spans that float16 cannot hold as normal numbers, where these are a thousandth of the mean or less.

    A segment of survivors that are nearly equal would cost all others float32.
    """
    least = torch.finfo(torch.float16).smallest_normal
    return torch.where(least <= span.mean() / 1000, span.clamp_min(least), span)


def _columns_of_segments(
    axis: WidthAxis, widths: Tensor, in_features: int, group_size: int | None
) -> list[slice | Tensor]:
    """Return an index of the columns of each segment, see `grids.segments_of`; slices where they need no copies."""
    if group_size is not None:
        return [slice(start, start + group_size) for start in range(0, in_features, group_size)]
    used = [] if axis == "output" else torch.unique(widths).tolist()
    return [widths == bits for bits in used] if len(used) > 1 else [slice(None)]


class _Segment(NamedTuple):
    """Columns that share a span and an origin in each row."""

    values: Tensor
    """`[out_features, columns]`; sizes of weights for `zero-free`."""
    cost: Tensor
    """What a squared error costs, same shape; entries of no cost do not count."""
    top: Tensor
    """The last step as a number; broadcasts with the values."""
    clip: Tensor
    """The last step in use."""
    least_origin: float

    def units(self, origin: Tensor, span: Tensor) -> Tensor:
        """Return the nearest levels of one interval per row, as fractions of the span."""
        steps = ((self.values - origin) * (self.top / span)).round_()
        return torch.minimum(steps.clamp_min_(0), self.clip, out=steps).div_(self.top)

    def error(self, origin: Tensor, span: Tensor, units: Tensor) -> Tensor:
        """Return the weighted error of each row, `[out_features, 1]`."""
        return torch.addcmul(origin - self.values, span, units).square_().mul_(self.cost).sum(1, keepdim=True)


def _search_segment(segment: _Segment, search: bool) -> tuple[Tensor, Tensor]:
    """Return origin and span of each row, `[out_features]` each."""
    values, cost = segment.values, segment.cost
    infinity = torch.finfo(values.dtype).max
    low = torch.where(cost > 0, values, infinity).amin(1, keepdim=True)
    high = torch.where(cost > 0, values, -infinity).amax(1, keepdim=True)
    empty = low > high
    low, high = low.masked_fill(empty, 0), high.masked_fill(empty, 1)
    floor = torch.maximum(_LEAST_SPAN * torch.maximum(high.abs(), low.abs()), (high == low) * high.abs())
    full = (high - low).maximum(floor)
    full = torch.where(full > 0, full, torch.ones_like(full))
    if not search:
        return low[:, 0], full[:, 0]
    origin, span = _regressed(segment, *_best_of_lattice(segment, low, full), floor)
    return origin[:, 0], span[:, 0]


def _best_of_lattice(segment: _Segment, low: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best origin and span of the lattice for each row, `[out_features, 1]` each."""
    values, cost, top, clip, _ = segment
    # In units of the full interval, shrinking is by the same numbers for all rows. Errors are counted in steps.
    steps = (values - low) * (top / full)
    root = cost.sqrt() / top
    spans = [[1 - low_shrink - high_shrink for high_shrink in HIGH_SHRINKS] for low_shrink in LOW_SHRINKS]
    at_once = max((_CUDA_ROOM if values.is_cuda else _CPU_ROOM) // steps.numel(), 1)
    errors: list[Tensor] = []
    for low_shrink, lengths in zip(LOW_SHRINKS, spans, strict=True):
        shifted = steps - low_shrink * top
        for some in torch.tensor(lengths, device=values.device)[:, None, None].split(at_once):
            scaled = shifted * some.reciprocal()
            nearest = scaled.round()
            torch.minimum(nearest.clamp_min_(0), clip, out=nearest)
            distance = torch.linalg.vector_norm(nearest.sub_(scaled).mul_(root), dim=2)
            errors.append(distance * some[:, 0])
    best = torch.cat(errors).argmin(0)
    shifts = low.new_tensor(LOW_SHRINKS).repeat_interleave(len(HIGH_SHRINKS))
    return low + shifts[best][:, None] * full, low.new_tensor(spans).flatten()[best][:, None] * full


_CPU_ROOM, _CUDA_ROOM = 2**18, 2**25
"""Entries of all intervals of the lattice that are tried at once: few enough for a cache, or for a GPU's memory."""


def _regressed(segment: _Segment, origin: Tensor, span: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Alternate codes and regression from an interval for each row, and return the best that was met."""
    values, cost = segment.values, segment.cost
    total, value = cost.sum(1, keepdim=True), (cost * values).sum(1, keepdim=True)
    units = segment.units(origin, span)
    best, found = segment.error(origin, span, units), (origin, span)
    for _ in range(REGRESSIONS):
        weighted = cost * units
        first, moment = weighted.sum(1, keepdim=True), (weighted * values).sum(1, keepdim=True)
        second = weighted.mul_(units).sum(1, keepdim=True)
        new_origin, new_span, unique = _regress(total, first, second, value, moment)
        new_span = torch.where(unique, new_span, span)
        usable = (new_span > floor) & (new_origin >= segment.least_origin)
        origin, span = torch.where(usable, new_origin, origin), torch.where(usable, new_span, span)
        units = segment.units(origin, span)
        error = segment.error(origin, span, units)
        better = error < best
        found = (torch.where(better, origin, found[0]), torch.where(better, span, found[1]))
        best = torch.where(better, error, best)
    return found


def _regress(a: Tensor, b: Tensor, c: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Solve [[a, b], [b, c]] p = [x, y] for each row.

    Returns p, and whether it is unique; where it is not (all codes equal), only the first unknown is solved for and
    the second is 0.
    """
    determinant = a * c - b * b
    unique = determinant > 1e-6 * a * c
    one = torch.ones_like(a)
    safe = torch.where(unique, determinant, one)
    alone = x / torch.where(a > 0, a, one)
    return (
        torch.where(unique, (c * x - b * y) / safe, alone),
        torch.where(unique, (a * y - b * x) / safe, torch.zeros_like(a)),
        unique,
    )


def refit_grid(grid: Grid, codes: Tensor, widths: Tensor, keep: Tensor | None, target: Tensor, hessian: Tensor) -> Grid:
    """Solve for origin and span given the codes.

    Args:
        grid: an `offset` or `zero-free` grid.
        codes: uint8 `[out_features, in_features]`.
        widths: bits per column or row, as `grid.axis` says, uint8.
        keep: True where a weight survives, or None for all, bool `[out_features, in_features]`.
        target: T, float32 `[out_features, in_features]`.
        hessian: H, damped, float32 `[in_features, in_features]`.

    Returns:
        A grid under which no row's error tr((T - Q) H (T - Q)') is higher.
    """
    segments = _columns_of_segments(grid.axis, widths, codes.shape[1], grid.group_size)
    stored = dequantize_matrix(codes, widths, grid)
    # The same codes on other grids give the factors of origin (the sign) and of span (sign times k / T).
    ones_grid = grid._replace(span=torch.ones_like(grid.span), origin=torch.ones_like(grid.origin))
    sign = dequantize_matrix(codes, widths, ones_grid).sign()
    unit = dequantize_matrix(codes, widths, ones_grid._replace(origin=torch.zeros_like(grid.origin)))
    if keep is not None:
        for part in (stored, sign, unit):
            part.masked_fill_(~keep, 0)
    span, origin = grid.span.clone(), grid.origin.clone()
    pull = (target - stored) @ hessian
    for index, chosen in enumerate(segments):
        inside = hessian[chosen][:, chosen]
        ones, units = sign[:, chosen], unit[:, chosen]
        ones_h, units_h = ones @ inside, units @ inside
        a, b, c = (ones_h * ones).sum(1), (ones_h * units).sum(1), (units_h * units).sum(1)
        x, y = (pull[:, chosen] * ones).sum(1), (pull[:, chosen] * units).sum(1)
        shift, stretch, _ = _regress(a, b, c, x, y)
        new_span = (span[:, index].float() + stretch).to(span.dtype)
        new_origin = (origin[:, index].float() + shift).to(origin.dtype)
        d_origin, d_span = new_origin.float() - origin[:, index].float(), new_span.float() - span[:, index].float()
        gain = 2 * (d_origin * x + d_span * y)
        gain = gain - (d_origin.square() * a + 2 * d_origin * d_span * b + d_span.square() * c)
        valid = (gain > 0) & (new_span > 0) & torch.isfinite(new_span) & torch.isfinite(new_origin)
        if grid.kind == "zero-free":
            valid &= new_origin >= 0
        span[:, index] = torch.where(valid, new_span, span[:, index])
        origin[:, index] = torch.where(valid, new_origin, origin[:, index])
        if index + 1 < len(segments):
            moved = (d_origin[:, None] * ones + d_span[:, None] * units) * valid[:, None]
            pull -= moved @ hessian[chosen]
    return grid._replace(span=span, origin=origin)
