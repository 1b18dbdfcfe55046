"""Groups of channels in the product's own solve: a width for each group, or a range for each row and group.

A rule hands over groups where the solve deals widths and where it fits grids; mask, sweep and all else are the
product's. What a group brings is told by groups of the same sizes that are made otherwise:

- `information`: by mutual information (`grouping.py`);
- `random`: a shuffle of those; `sorted`: by the largest weight of a column; `contiguous`: as the columns stand;
- `channels`: no groups, a width for each channel by the recipe's allocation; `shuffled`: the same by the importance of
  another channel. Where the groups have ranges, these two spend on widths what the groups spend on ranges.

A range takes 24 bits a row and group, a group number ceil(log2 groups) bits a column; both are stored, so a file made
by way of a rule has the true size. The format knows no groups that are not contiguous: such a file only is counted.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from sgpt_lightning.calibration import solving
from sgpt_lightning.calibration.collector import InputCollector
from sgpt_lightning.core import rounding
from sgpt_lightning.core.budget import count_survivors, grid_kind
from sgpt_lightning.core.grids import Grid, Scale, WidthAxis, fit_affine_grid
from sgpt_lightning.core.linear import LinearProblem, Rounded, Start
from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.core.ranges import search_grid
from sgpt_lightning.core.sizes import index_bits
from sgpt_lightning.core.solution import Quantized, Solution
from sgpt_lightning.experiments.controls import Rule, replaced
from sgpt_lightning.experiments.grouping import (
    allocate_groups,
    dissimilarity,
    group_channels,
    inside_and_between,
    pair_information,
    silhouette,
)
from sgpt_lightning.format.bits import pack_bits, packed_bytes, unpack_bits
from sgpt_lightning.format.layout import PackedWeight, origin_name
from sgpt_lightning.format.packing import pack_weight, unpack_solutions, unpack_weight
from sgpt_lightning.guards import evaluation_mode
from sgpt_lightning.models.batches import model_inputs
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.identity import exact_digest, weights_digest

Share = Literal["width", "grid"]
Kind = Literal["information", "random", "sorted", "contiguous", "channels", "shuffled"]
RANGE_BITS = 24
"""Of a row and group: a span in float16, a zero point in 8 bits."""
_GROUPS = "weight_groups"


class GroupedGrid(Grid):
    """A grid whose segments are groups of columns, wherever these are."""

    groups: Tensor
    """The group of each column, int64 `[in_features]`, from 0 without gaps."""

    @classmethod
    def of(cls, grid: Grid, groups: Tensor) -> "GroupedGrid":
        """Return a grid that has a segment for each group."""
        new = cls(*grid)
        new.groups = groups
        return new

    def segments(self, widths: Tensor, in_features: int) -> Tensor:
        """Return the group of each column."""
        return self.groups

    def of_all(self, bits: int, in_features: int) -> Scale:
        """Return the scale where all columns have one width."""
        return self.at(bits, self.groups)


def fit_grouped(problem: LinearProblem, survivors: Tensor, widths: Tensor, groups: Tensor) -> GroupedGrid:
    """Fit a range to every row and group, as the solve fits one to every row.

    Args:
        problem: the linear; one width for all channels, no descent over the codes.
        survivors: float32 `[out_features, in_features]`.
        widths: uint8 `[in_features]`, all the same.
        groups: the group of each column, int64 `[in_features]`, without gaps.
    """
    recipe, kind = problem.recipe, grid_kind(problem.recipe)
    assert not recipe.solve_parts.descent_passes, "descent refits ranges of its own segments"
    bits, cost = int(widths[0]), problem.objective.input.damped.diagonal()

    def fitted(chosen: Tensor) -> Grid:
        if kind == "zero-point":
            return fit_affine_grid(survivors[:, chosen], bits)
        return search_grid(
            kind, survivors[:, chosen], cost[chosen], widths[chosen], search=recipe.solve_parts.range_search
        )

    grids = [fitted(groups == group) for group in range(int(groups.max()) + 1)]
    span, origin = (torch.cat(parts, 1) for parts in zip(*((grid.span, grid.origin) for grid in grids), strict=True))
    return GroupedGrid.of(Grid(kind, span, origin, bits), groups)


class Grouped(NamedTuple):
    """The groups of one input."""

    sizes: list[int]
    """Channels of each group."""
    inside: float
    """Mean information of pairs of channels in one group, nats."""
    between: float
    """The same of pairs in two groups; NaN where there is one group."""
    silhouette: float
    """In [-1, 1]: near 0 where a channel is hardly nearer to its own group than to the next one."""


class InformedGroups:
    """Groups by mutual information of what linears receive in a dense model; they are kept for the next rule.

    Args:
        count: groups at most, or `auto`.
        share: what a group is to have.
    """

    def __init__(self, count: int | Literal["auto"], share: Share) -> None:
        self.count, self.share = count, share
        self.seen: dict[str, Grouped] = {}
        """What the groups of the last model that was shown are like, by the first linear that receives an input."""
        self._by_name: dict[str, Tensor] = {}
        self._shown: str | None = None

    def _made(self, statistics: InputStatistics) -> Tensor:
        # A range for weights of inputs that say nothing would be a waste; a narrow width for them is none.
        return group_channels(statistics, self.count, dead_apart=self.share == "width")

    @torch.no_grad()
    def show(self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Make the groups of all linears in decoder blocks, unless it was this model and these batches already."""
        windows = ((str(index), batch["input_ids"]) for index, batch in enumerate(batches))
        shown = f"{weights_digest(model)} {exact_digest(windows)}"
        if shown == self._shown:
            return
        collector = InputCollector(find_decoder_blocks(model).linears())
        with evaluation_mode(model):
            for index, batch in enumerate(batches):
                with collector.collecting(index):
                    model(**model_inputs(batch))
        collector.check()
        leaders = {name: collector.leader(name) for name in collector.linears}
        made = {name: self._made(collector.statistics(name)) for name in dict.fromkeys(leaders.values())}
        self.seen = {name: _described(collector.statistics(name), groups) for name, groups in made.items()}
        self._by_name, self._shown = {name: made[leader] for name, leader in leaders.items()}, shown

    def of(self, problem: LinearProblem) -> Tensor:
        """Return the group of each column of a linear; by its own input where no model was shown that has it."""
        known = self._by_name.get(problem.name)
        return self._made(problem.objective.input.statistics) if known is None else known


def _described(statistics: InputStatistics, groups: Tensor) -> Grouped:
    information, sizes = pair_information(statistics), groups.bincount().tolist()
    inside, between = inside_and_between(information, groups)
    return Grouped(sizes, inside, between, silhouette(dissimilarity(information), groups))


def grouped(kind: Kind, informed: InformedGroups, draw: int = 0) -> Rule:
    """Return a rule that groups channels.

    Args:
        kind: how, see the module's docstring.
        informed: groups by mutual information, whose sizes all others have, and what a group shares: one width, for
            recipes with `allocation` `budget` or `loss`; or a range for each row, for those with `uniform`.
        draw: number of the draw, for `random` and `shuffled`.
    """
    identity = {"rule": "groups", "kind": kind, "share": informed.share, "count": informed.count, "draw": draw}
    return Rule(identity, lambda seed: _Grouping(kind, informed, 1000 * seed + draw).followed(), informed.show)


class _Grouping:
    """What a rule does to one linear after the other."""

    def __init__(self, kind: Kind, informed: InformedGroups, seed: int) -> None:
        self._kind, self._informed = kind, informed
        self._generator = torch.Generator().manual_seed(seed)
        self._deal = rounding.deal_widths

    def _shuffle(self, values: Tensor) -> Tensor:
        return values[torch.randperm(len(values), generator=self._generator).to(values.device)]

    def groups(self, problem: LinearProblem) -> Tensor:
        """Return the group of each column of a linear, int64 `[in_features]`."""
        groups = self._informed.of(problem)
        if self._kind == "information":
            return groups
        if self._kind == "random":
            return self._shuffle(groups)
        if self._kind == "contiguous":
            return groups.sort().values
        order = problem.objective.weight.abs().amax(0).argsort(descending=True, stable=True)
        return torch.empty_like(groups).index_copy_(0, order, groups.sort().values)

    def fit(self, problem: LinearProblem, start: Start, widths: Tensor, axis: WidthAxis) -> Grid:
        """Take the place of `rounding.fit_grid`."""
        return fit_grouped(problem, start.survivors, widths, self.groups(problem))

    def deal(self, problem: LinearProblem, start: Start, uniform: Rounded | None) -> Tensor:
        """Take the place of `rounding.deal_widths`."""
        if self._kind in ("channels", "shuffled"):
            return self._deal(self._without_groups(problem), start, uniform)
        allocate = partial(allocate_groups, groups=self.groups(problem))
        with replaced(rounding, "allocate_budget", allocate):
            return self._deal(problem, start, uniform)

    def _without_groups(self, problem: LinearProblem) -> LinearProblem:
        """Return a problem whose widths may take what groups would take."""
        recipe, shape = problem.recipe, problem.shape
        if self._kind == "shuffled":
            problem = problem._replace(importance=self._shuffle(problem.importance))
        if self._informed.share == "width":
            return problem
        count = int(self._informed.of(problem).max()) + 1
        tables = 8 * packed_bytes(shape[1], index_bits(len(recipe.widths))) + 7 * len(recipe.widths)
        spare = grouping_bits(shape, count) - tables
        assert recipe.target_avg_bits is not None
        mean = recipe.target_avg_bits + spare / count_survivors(recipe, shape)
        return problem._replace(recipe=replace(recipe, target_avg_bits=min(mean, recipe.widths[-1])))

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Let every solve follow the rule."""
        with ExitStack() as stack:
            if self._informed.share == "width" or self._kind in ("channels", "shuffled"):
                stack.enter_context(replaced(rounding, "deal_widths", self.deal))
            else:
                stack.enter_context(replaced(rounding, "fit_grid", self.fit))
                stack.enter_context(replaced(solving, "pack_weight", pack_grouped))
                stack.enter_context(replaced(solving, "unpack_weights", unpack_grouped))
            yield


def grouping_bits(shape: tuple[int, int], count: int) -> int:
    """Return the bits that groups take beyond what one range for each row takes.

    Args:
        shape: (out_features, in_features).
        count: groups.
    """
    numbers = 8 * packed_bytes(shape[1], index_bits(count)) if count > 1 else 0
    return RANGE_BITS * shape[0] * (count - 1) + numbers


def pack_grouped(solution: Solution) -> PackedWeight:
    """Pack a matrix as the product does, and beside it the group of each column, if it has groups."""
    packed = pack_weight(solution)
    if not isinstance(solution, Quantized) or not isinstance(solution.grid, GroupedGrid):
        return packed
    count = solution.grid.span.shape[1]
    if count > 1:
        packed.tensors[_GROUPS] = pack_bits(solution.grid.groups, index_bits(count))
    return packed


def unpack_grouped(matrices: Sequence[PackedWeight]) -> list[Tensor]:
    """Return the weights of matrices that `pack_grouped` packed, float32 `[out_features, in_features]` each."""
    return [_unpacked(packed) for packed in matrices]


def _unpacked(packed: PackedWeight) -> Tensor:
    spec, tensors = packed
    if _GROUPS not in tensors:
        return unpack_weight(packed)
    ranges = ("weight_range", origin_name(spec))
    plain = {name: tensors[name] for name in tensors if name != _GROUPS}
    # The product reads codes and mask behind one range for each row, and the ranges of the groups take its place.
    (solution,) = unpack_solutions([PackedWeight(spec, plain | {name: tensors[name][:, :1] for name in ranges})])
    assert isinstance(solution, Quantized)
    span, origin = (tensors[name] for name in ranges)
    groups = unpack_bits(tensors[_GROUPS], index_bits(span.shape[1]), spec.shape[1]).long()
    grid = GroupedGrid.of(solution.grid._replace(span=span, origin=origin), groups)
    return replace(solution, grid=grid).weight()
