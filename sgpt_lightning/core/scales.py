"""The levels of every column of a loop as tables of numbers, which torch and a GPU kernel read alike.

A column's levels are a row of the tables: `step`, `base` and `top` of each output, used as `grids.Scale` uses them.
`index` says which row a column takes. Columns of one width and segment share a row.

A fourth kind, for codes that are entropy-coded, has no ends and no base:

    integer     q = step * k                       k any whole number, the nearest to w / step, halves to even

Linears that receive the same input can be swept as one matrix: their tables side by side are tables again.
"""

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.core.grids import Grid, GridKind, Scale, fit_affine_grid

LevelKind = GridKind | Literal["integer"]


class IntegerScale(NamedTuple):
    """Whole multiples of a step, without end."""

    step: Tensor
    """float32, positive; broadcasts with the weights."""

    def nearest(self, weight: Tensor) -> Tensor:
        """Return the nearest levels, float32; a weight in the middle goes to the even multiple."""
        return (weight / self.step).round_().mul_(self.step)


class ColumnScales:
    """A grid laid out for column loops: the scale of each column without reading values back.

    Args:
        grid: spans and origins.
        widths: bits per column, uint8 `[in_features]`, in the matrix's own order, or per row, uint8 `[out_features]`,
            as `grid.axis` says.
        in_features: columns of the matrix.
        order: the order in which the loop takes the columns; None for their own.
        refit_groups: fit each group's `zero-point` grid anew from the running weight when the loop reaches it, as
            GPTQ does.
    """

    kind: LevelKind
    step: Tensor
    """float32 `[tables, out_features]`, or `[tables, 1]` where all outputs share a step; `base` and `top` likewise."""
    base: Tensor
    top: Tensor
    index: Tensor
    """The row of the tables that a column of the loop takes, int64 `[in_features]`."""
    refit_size: int | None = None
    """Columns of a group that is fitted on the way, or None."""
    parts: "tuple[ColumnScales, ...]" = ()
    """The scales that were stacked."""

    def __init__(
        self,
        grid: Grid,
        widths: Tensor,
        in_features: int,
        order: Tensor | None = None,
        refit_groups: bool = False,
    ) -> None:
        self.kind = grid.kind
        self._grid: Grid | None = grid
        self.refit_size = grid.group_size if refit_groups else None
        self._widths = widths
        index = grid.segments(widths, in_features)
        if grid.axis == "output":
            self._bits: list[int] | None = None
        else:
            used = torch.unique(widths)
            self._bits = used.tolist()
            index = index + torch.searchsorted(used, widths.contiguous()) * grid.span.shape[1]
        self.index = index if order is None else index[order]
        self._set_tables()

    def _at(self, segments: slice) -> list[Scale]:
        """Return the scales of segments, `[out_features, segments]`, for each width in use or for the rows' widths."""
        if self._bits is None:
            return [self.grid.at_rows(self._widths, segments)]
        return [self.grid.at(bits, segments) for bits in self._bits]

    @property
    def grid(self) -> Grid:
        """What the scales were made of, with groups as they were fitted on the way.

        Raises:
            ValueError: the scales are of kind `integer`, or stacked: then each of `parts` has a grid.
        """
        if self._grid is None:
            raise ValueError(f"{'stacked' if self.parts else self.kind} scales have no grid of their own")
        return self._grid

    def _set_tables(self) -> None:
        """Lay the scales below each other, inputs first."""
        scales = self._at(slice(None))
        self.step = torch.cat([scale.step.T for scale in scales])
        self.base = torch.cat([scale.base.T for scale in scales])
        rows, outputs = self.step.shape
        if isinstance(scales[0].top, Tensor):
            self._tops: list[int] | None = None
            self.top = scales[0].top.T.expand(rows, outputs)
        else:
            self._tops = [int(scale.top) for scale in scales for _ in range(scale.step.shape[1])]
            self.top = torch.tensor(self._tops, dtype=torch.float32, device=self.step.device)[:, None]

    @classmethod
    def integer(cls, step: Tensor, out_features: int = 1) -> "ColumnScales":
        """Return the scales of whole multiples of a step per column, the same for all rows.

        Args:
            step: positive, float32 `[in_features]`, in the loop's order.
            out_features: rows of the matrix; needed only where scales are stacked.
        """
        rows = torch.arange(len(step), device=step.device)
        table = step.float()[:, None].expand(-1, out_features)
        return cls._of_tables("integer", table, torch.zeros_like(table[:, :1]), torch.zeros_like(table[:, :1]), rows)

    @classmethod
    def stacked(cls, scales: "Sequence[ColumnScales]") -> "ColumnScales":
        """Return the scales of matrices that lie side by side along out_features and are swept as one.

        Groups that are fitted on the way are fitted in each of `scales` as well, so that its `grid` can be read after.

        Raises:
            ValueError: kinds, in_features or the groups fitted on the way differ.
        """
        first, *others = scales
        for other in others:
            for what in ("kind", "refit_size"):
                if getattr(other, what) != getattr(first, what):
                    raise ValueError(
                        f"scales that are stacked differ in {what}: {getattr(first, what)}, {getattr(other, what)}"
                    )
            if len(other.index) != len(first.index):
                raise ValueError(f"scales that are stacked have {len(first.index)} and {len(other.index)} in_features")
        alike = all(len(s.step) == len(first.step) and torch.equal(s.index, first.index) for s in others)
        tables = {
            name: torch.cat([_wide(scale, name) if alike else _wide(scale, name)[scale.index] for scale in scales], 1)
            for name in ("step", "base", "top")
        }
        rows = first.index if alike else torch.arange(len(first.index), device=first.index.device)
        result = cls._of_tables(first.kind, tables["step"], tables["base"], tables["top"], rows)
        result.refit_size, result.parts = first.refit_size, tuple(scales)
        if alike and all(scale._tops == first._tops for scale in others):
            result._tops = first._tops
        return result

    @classmethod
    def _of_tables(cls, kind: LevelKind, step: Tensor, base: Tensor, top: Tensor, index: Tensor) -> "ColumnScales":
        new = cls.__new__(cls)
        new.kind, new.step, new.base, new.top, new.index = kind, step, base, top, index
        new._grid = new._tops = None
        return new

    @cached_property
    def _scales(self) -> list[Scale] | list[IntegerScale]:
        """The rows of the tables; they are views, so a group that is fitted anew changes them."""
        if self.kind == "integer":
            return [IntegerScale(step) for step in self.step.unbind()]
        tops: Sequence[int | Tensor] = self.top.unbind() if self._tops is None else self._tops
        rows = zip(tops, self.step.unbind(), self.base.unbind(), strict=True)
        return [Scale(self.kind, top, step, base) for top, step, base in rows]

    @cached_property
    def _rows(self) -> list[int]:
        return self.index.tolist()

    def scale(self, column: int) -> Scale | IntegerScale:
        """Return the scale of one column of the loop, `[out_features]`."""
        return self._scales[self._rows[column]]

    def reach(self, column: int, weight: Tensor) -> None:
        """Refit the group that starts at a column; `weight` is the running one, `[in_features, out_features]`."""
        size = self.refit_size
        if size is None or column % size:
            return
        if self.parts:
            self._reach_parts(column, weight)
            return
        grid, group = self.grid, column // size
        fitted = fit_affine_grid(weight[column : column + size].T.contiguous(), grid.max_bits)
        grid.span[:, group] = fitted.span[:, 0].to(grid.span.dtype)
        grid.origin[:, group] = fitted.origin[:, 0]
        for table, scale in enumerate(self._at(slice(group, group + 1))):
            row = table * grid.span.shape[1] + group
            self.step[row], self.base[row] = scale.step[:, 0], scale.base[:, 0]

    def _reach_parts(self, column: int, weight: Tensor) -> None:
        """Refit a group in each part, and copy the rows that its columns take."""
        assert self.refit_size is not None
        columns = slice(column, column + self.refit_size)
        ends = list(itertools.accumulate(part.step.shape[1] for part in self.parts))
        for part, end in zip(self.parts, ends, strict=True):
            outputs = slice(end - part.step.shape[1], end)
            part.reach(column, weight[:, outputs])
            self.step[self.index[columns], outputs] = part.step[part.index[columns]]
            self.base[self.index[columns], outputs] = part.base[part.index[columns]]


def _wide(scale: ColumnScales, name: str) -> Tensor:
    """Return a table with a column for each output."""
    table: Tensor = getattr(scale, name)
    return table.expand(-1, scale.step.shape[1])
