"""The values that a code can stand for: three kinds of grid, one arithmetic for all widths.

A grid has a span and an origin per row and segment; a segment is a set of columns that share them. Every width b
divides the span of its segment into T steps, and a code c stands for

    zero-point  q = span / T * (c - z)             T = 2^b - 1     z a whole number, so that zero is on the grid
    offset      q = origin + span / T * c          T = 2^b - 1     zero is nothing special
    zero-free   q = +-(origin + span / T * k)      T = 2^(b-1) - 1 the highest bit of c is the sign, the rest is k

`zero-point` is GPTQ's per-row min-max grid (arXiv 2210.17323, section 4) and the one that can write a removed weight as
a code; its origin is z at the widest width in use. `zero-free` is for survivors of a mask: the mask already says what
is zero, so no code is spent on it.

Widths belong to input channels (columns) or to output channels (rows). Segments are `group_size` consecutive columns;
without groups, the columns of one width, or all columns where widths belong to rows and for `zero-point`.

Spans and origins are rounded to the precision in which they are stored before anything is quantized with them, so
what the solver saw and what a reader of the file sees are the same numbers.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

GridKind = Literal["zero-point", "offset", "zero-free"]
WidthAxis = Literal["input", "output"]


def top_step(kind: GridKind, bits: int) -> int:
    """Steps between the lowest and the highest level of a width (of one sign, for `zero-free`)."""
    return (1 << (bits - (kind == "zero-free"))) - 1


class Scale(NamedTuple):
    """A grid at one width: what turns codes into values; the tensors broadcast with the weights."""

    kind: GridKind
    top: int | Tensor
    """The last step, `top_step` of the width (of each row's width)."""
    step: Tensor
    base: Tensor

    def _clamped(self, steps: Tensor) -> Tensor:
        if isinstance(self.top, int):
            return steps.clamp_(0, self.top)
        return torch.minimum(steps.clamp_min_(0), self.top, out=steps)

    def quantize(self, weight: Tensor) -> Tensor:
        """Return the codes of the nearest levels, float32."""
        if self.kind == "zero-point":
            return self._clamped((weight / self.step).round_().add_(self.base))
        if self.kind == "offset":
            return self._clamped(((weight - self.base) / self.step).round_())
        code = self._clamped(((weight.abs() - self.base) / self.step).round_())
        return code.add_(torch.signbit(weight) * (self.top + 1))

    def nearest(self, weight: Tensor) -> Tensor:
        """Return the nearest levels themselves, float32: what `dequantize` makes of `quantize`, in fewer operations."""
        if self.kind == "zero-point":
            return self._clamped((weight / self.step).round_().add_(self.base)).sub_(self.base).mul_(self.step)
        if self.kind == "offset":
            return self._clamped((weight - self.base).div_(self.step).round_()).mul_(self.step).add_(self.base)
        size = self._clamped(weight.abs().sub_(self.base).div_(self.step).round_()).mul_(self.step).add_(self.base)
        return torch.copysign(size, weight)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the values of codes, float32 in the shape of a matrix."""
        return self.dequantize_(codes.clone())

    def dequantize_(self, codes: Tensor) -> Tensor:
        """Turn codes, float32 in the shape of a matrix, into their values in place; return them."""
        # Products and sums are separate operations: fused, their last bit would depend on the device.
        if self.kind == "zero-point":
            return codes.sub_(self.base).mul_(self.step)
        if self.kind == "offset":
            return codes.mul_(self.step).add_(self.base)
        half = self.top + 1
        negative = codes >= half
        magnitude = codes.sub_(negative * half).mul_(self.step).add_(self.base)
        return codes.copy_(torch.where(negative, -magnitude, magnitude))


class Grid(NamedTuple):
    """Span and origin per row and segment, see the module's docstring."""

    kind: GridKind
    span: Tensor
    """`[out_features, segments]`, positive, float16 (float32 where float16 cannot hold it)."""
    origin: Tensor
    """`[out_features, segments]`; uint8 for `zero-point`, otherwise the dtype of `span`."""
    max_bits: int
    """The widest width in use."""
    group_size: int | None = None
    """Columns per segment, or None."""
    axis: WidthAxis = "input"
    """What has a width: each input channel, or each output channel."""

    def segments(self, widths: Tensor, in_features: int) -> Tensor:
        """Return the segment of each column, int64 `[in_features]`; `widths` as for `dequantize_matrix`."""
        return segments_of(self.kind, self.axis, widths, in_features, self.group_size)

    def at(self, bits: int, segments: Tensor | slice = slice(None)) -> Scale:
        """Return step and base of one width, float32 `[out_features, len(segments)]`."""
        span, origin = self.span[:, segments].float(), self.origin[:, segments].float()
        top = top_step(self.kind, bits)
        # Divided by a tensor: by a number, CUDA multiplies with the reciprocal, and a file solved on a GPU would
        # read back differently on a CPU.
        step = span / torch.full_like(span, max(top, 1))
        if self.kind == "zero-point" and bits != self.max_bits:
            origin = (origin * (top / top_step(self.kind, self.max_bits))).round()
        return Scale(self.kind, top, step, origin)

    def of_all(self, bits: int, in_features: int) -> Scale:
        """Return the scale where all columns have one width; it broadcasts with the matrix."""
        if self.group_size is None:
            return self.at(bits)
        return self.at(bits, torch.arange(in_features, device=self.span.device) // self.group_size)

    def at_rows(self, widths: Tensor, segments: Tensor | slice = slice(None)) -> Scale:
        """Return the scale where each row has a width, float32 `[out_features, len(segments)]`, top one per row."""
        scales = {bits: self.at(bits, segments) for bits in torch.unique(widths).tolist()}
        step, base = torch.empty_like(self.span[:, segments].float()), torch.empty_like(self.span[:, segments].float())
        top = torch.empty(len(widths), 1, dtype=torch.float32, device=step.device)
        for bits, scale in scales.items():
            rows = widths == bits
            step[rows], base[rows], top[rows] = scale.step[rows], scale.base[rows], float(scale.top)
        return Scale(self.kind, top, step, base)


def segments_of(kind: GridKind, axis: WidthAxis, widths: Tensor, in_features: int, group_size: int | None) -> Tensor:
    """Return the segment of each column, int64 `[in_features]`."""
    if group_size is not None:
        return torch.arange(in_features, device=widths.device) // group_size
    if kind == "zero-point" or axis == "output":
        return torch.zeros(in_features, dtype=torch.int64, device=widths.device)
    return torch.searchsorted(torch.unique(widths), widths.contiguous())


def count_segments(
    kind: GridKind, axis: WidthAxis, widths: Sequence[int], in_features: int, group_size: int | None
) -> int:
    """Return how many segments a matrix has whose widths in use are `widths`."""
    if group_size is not None:
        return -(-in_features // group_size)
    return 1 if kind == "zero-point" or axis == "output" else len(set(widths))


def fit_affine_grid(weight: Tensor, max_bits: int, group_size: int | None = None, *, symmetric: bool = False) -> Grid:
    """Fit the smallest `zero-point` span per row (and group) that holds every weight and zero.

    Args:
        weight: float32 `[out_features, in_features]`, removed weights set to zero.
        max_bits: the widest width that will be used.
        group_size: columns per segment; None for the whole row.
        symmetric: take the span from -max|w| to max|w| and the zero point 2^(max_bits - 1), as the published code's
            `sym=True`; a level more lies below zero than above, for every width.
    """
    pieces = weight.split(group_size or weight.shape[1], dim=1)
    low = torch.stack([piece.amin(1) for piece in pieces], 1).clamp_max(0)
    high = torch.stack([piece.amax(1) for piece in pieces], 1).clamp_min(0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    span = high - low
    span = torch.where(span > 0, span, torch.ones_like(span))
    span = span.to(stored_dtype(span))
    top = top_step("zero-point", max_bits)
    zero_point = (-low / span.float() * top).round().clamp(0, top)
    if symmetric:
        zero_point.fill_((top + 1) // 2)  # half of `top` lies between two codes, and the span is rounded
    return Grid("zero-point", span, zero_point.to(torch.uint8), max_bits, group_size)


def stored_dtype(span: Tensor, origin: Tensor | None = None) -> torch.dtype:
    """Return float16 if it holds all spans as normal numbers and all origins, otherwise float32."""
    half = torch.finfo(torch.float16)
    fits = bool((span >= half.smallest_normal).all() & (span <= half.max).all())
    return torch.float16 if fits and (origin is None or bool((origin.abs() <= half.max).all())) else torch.float32


def quantize_matrix(weight: Tensor, widths: Tensor, grid: Grid) -> Tensor:
    """Return the codes of the nearest levels, uint8 `[out_features, in_features]`; arguments as below."""
    if grid.axis == "output":
        return grid.at_rows(widths, grid.segments(widths, weight.shape[1])).quantize(weight).to(torch.uint8)
    used = torch.unique(widths).tolist()
    if len(used) == 1:
        return grid.of_all(used[0], weight.shape[1]).quantize(weight).to(torch.uint8)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    segments = grid.segments(widths, weight.shape[1])
    for bits in used:
        columns = widths == bits
        codes[:, columns] = grid.at(bits, segments[columns]).quantize(weight[:, columns]).to(torch.uint8)
    return codes


def dequantize_matrix(codes: Tensor, widths: Tensor, grid: Grid) -> Tensor:
    """Turn a whole matrix of codes back into weights.

    Args:
        codes: uint8 `[out_features, in_features]`.
        widths: bits per column, uint8 `[in_features]`, or per row, uint8 `[out_features]`, as `grid.axis` says.
        grid: the rows' spans and origins.

    Returns:
        float32 `[out_features, in_features]`.
    """
    if grid.axis == "output":
        return grid.at_rows(widths, grid.segments(widths, codes.shape[1])).dequantize(codes.float())
    used = torch.unique(widths).tolist()
    if len(used) == 1:
        return grid.of_all(used[0], codes.shape[1]).dequantize(codes.float())
    weight = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    segments = grid.segments(widths, codes.shape[1])
    for bits in used:
        columns = widths == bits
        weight[:, columns] = grid.at(bits, segments[columns]).dequantize(codes[:, columns].float())
    return weight
