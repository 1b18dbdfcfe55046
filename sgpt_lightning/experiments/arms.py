"""An arm of a study: one way to compress, as plain data with a name, so that a changed arm is known to be another."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.core.solution import CompressedLinear
from sgpt_lightning.core.solver import LinearToSolve, compress_linears
from sgpt_lightning.experiments.controls import Rule, round_to_nearest
from sgpt_lightning.format.entropy import coded_size
from sgpt_lightning.format.records import SolvedLinear
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.recipe import Recipe

Family = Literal["dense", "rival", "ours"]
Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Arm:
    """One way to compress; what every arm is compared with, the dense model, is none."""

    name: str
    """Unique within a study."""
    recipe: Recipe | None = None
    """What to do; None rounds to nearest."""
    rule: Rule | None = None
    """What takes the place of a part of the solve."""
    round_bits: int = 4
    """Width of the codes where there is no recipe."""
    family: Family = "rival"
    """Decides the colour in a figure."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result, plain JSON values; names and colours do not."""
        if self.recipe is None:
            return {"round_to_nearest": self.round_bits}
        return {"recipe": asdict(self.recipe), "rule": None if self.rule is None else dict(self.rule.identity)}

    def compress(
        self, model: nn.Module, batches: Batches, seed: int, blocks: int | None = None
    ) -> dict[str, SolvedLinear]:
        """Compress a model in place.

        Args:
            model: dense, decoder-only.
            batches: calibration batches, `input_ids` int64 `[batch, time]`, on the model's device.
            seed: of what the arm's rule draws.
            blocks: decoder blocks that are compressed, from the first; None compresses all.

        Returns:
            What to store, by full name.

        Raises:
            ValueError: as `calibration.compress`.
        """
        decoder = find_decoder_blocks(model)
        left = range(len(decoder.blocks) if blocks is None else blocks, len(decoder.blocks))
        if self.recipe is None:
            linears = {name: part for name, part in decoder.linears().items() if decoder.place(name)[0] not in left}
            return round_to_nearest(linears, self.round_bits)
        if self.rule is not None and self.rule.show is not None:
            self.rule.show(model, batches)
        ignore = (*self.recipe.ignore, *(f"{decoder.name(index)}.*" for index in left))
        with self._rule(seed):
            return compress(model, batches, replace(self.recipe, ignore=ignore), storage_dtype=torch.float16)

    def solve(self, weight: Tensor, statistics: InputStatistics, seed: int) -> CompressedLinear:
        """Compress one matrix that has no bias and no model around it.

        Args:
            weight: `[out_features, in_features]`.
            statistics: what its input looked like.
            seed: of what the arm's rule draws.

        Raises:
            ValueError: as `compress_linears`, or the arm rounds without a solve.
        """
        if self.recipe is None:
            raise ValueError(f"the arm {self.name!r} has no recipe to solve a layer by")
        with self._rule(seed):
            return compress_linears([LinearToSolve(weight)], statistics, self.recipe, coded_size=coded_size)[0]

    def _rule(self, seed: int) -> Any:
        return nullcontext() if self.rule is None else self.rule.followed(seed)


def ours(name: str, **settings: Any) -> Arm:
    """Return an arm of a recipe; those of the preset `best` are ours, others rivals."""
    recipe = Recipe(**settings)
    return Arm(name, recipe, family="ours" if recipe.preset == "best" else "rival")
