"""Calibration with gradients: one epoch of the dense model, forwards and backwards, before another calibration.

Where blocks come to the device one at a time, so do gradients (`gradients_by_block.py`), and where there is one budget
for the model the batches pass the dense model once more, forwards: a block's statistics need the gradients of all
batches to become a curve of bits, or points to choose from, and they are let go of then.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sgpt_lightning.calibration.by_block import BATCHES, BatchesByBlock
from sgpt_lightning.calibration.collector import InputCollector
from sgpt_lightning.calibration.gradients import OutputGradients
from sgpt_lightning.calibration.gradients_by_block import GradientsByBlock
from sgpt_lightning.calibration.hidden_states import Activations
from sgpt_lightning.calibration.meter import Announce, nobody
from sgpt_lightning.calibration.plan import LinearJob, Plans, plan_model, plan_rates
from sgpt_lightning.calibration.progress import Progress
from sgpt_lightning.calibration.solving import owners_of
from sgpt_lightning.calibration.stages import BatchCount, Calibration, Stage
from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.format.records import SolvedLinear
from sgpt_lightning.models.batches import forwards, real_tokens
from sgpt_lightning.models.linears import weight_matrix
from sgpt_lightning.models.placement import placement_of
from sgpt_lightning.recipe import Recipe


class _Shown(NamedTuple):
    """A batch that the dense model was run on."""

    batch_index: int
    batch: Mapping[str, Tensor]
    real: Tensor | None
    """Positions of the tokens that count, see `real_tokens`."""


class GuidedCalibration:
    """One epoch of gradients and plans on the dense model, then another calibration that follows them.

    Args:
        model: a dense model.
        recipe: what to do.
        plans: what is known before.
        then: makes the calibration that follows.
        tf32: see `InputStatistics`.
        activations: where hidden states are, if blocks come to the device one at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        plans: Plans,
        then: Callable[[Plans], Calibration],
        tf32: bool = False,
        activations: Activations = "auto",
    ) -> None:
        linears = plans.linears()
        self.announce: Announce = nobody
        self._model = model
        self._recipe = recipe
        self.plans = plans
        self._then = then
        self._next = then(plans)
        self._count = BatchCount()
        self._tf32 = tf32
        self._text = BatchesByBlock(model, activations) if placement_of(model).moves else None
        self._shown: list[_Shown] = []
        self._gradients = (
            OutputGradients(model, linears, plans.decoder.blocks)
            if self._text is None
            else GradientsByBlock(model, linears, self._text)
        )
        self._collector = InputCollector(linears if recipe.scope == "model" and self._text is None else {}, tf32)

    @property
    def stages(self) -> Sequence[Stage]:
        """The gradients, at the end of which nothing is solved, and the stages of the calibration that follows."""
        return [Stage("gradients of the dense model", 0), *self._next.stages]

    def observe(self, epoch: int, batch_index: int, batch: Mapping[str, Tensor]) -> None:
        """Run the dense model forwards and backwards in epoch 0; hand later epochs on."""
        self._count.add(epoch, batch_index)
        if epoch:
            self._next.observe(epoch - 1, batch_index, batch)
            return
        for part in forwards(self._model, batch):
            shown, real = real_tokens(part)
            with self._collector.collecting(batch_index, real):
                self._gradients.observe(batch_index, shown)
            if self._recipe.scope == "model" and self._text is not None:
                self._shown.append(_Shown(batch_index, shown, real))

    def finish(self, epoch: int) -> dict[str, SolvedLinear]:
        """Plan at the end of epoch 0; solve at the end of later ones."""
        ranks = self.plans.ranks
        with ranks.outcome():
            self._count.check(epoch)
            if not epoch:
                if self._text is not None:
                    self.announce("gradients")
                self._gradients.end()
                self.announce("plan")
                self._collector.check()
                self._gradients.check()
        if epoch:
            return self._next.finish(epoch - 1)
        self._gradients.reduce(ranks)
        weights = {name: self._gradients.row_weights(name) for name in self.plans.recipes}
        recipes, budget = self.plans.recipes, self.plans.budget
        if self._recipe.scope == "model":
            if self._recipe.coding == "entropy":
                budget = budget.dealt(plan_rates(self._jobs(weights), ranks))
            else:
                recipes = {**recipes, **plan_model(self._jobs(weights), ranks)}
        self.plans = replace(self.plans, recipes=recipes, row_weights=weights, budget=budget)
        self._next = self._then(self.plans)
        return {}

    def _jobs(self, row_weights: Mapping[str, Tensor]) -> Iterator[dict[str, LinearJob]]:
        """Yield what is to be planned over the model: all of it, or one block after another."""
        if self._text is None:
            yield self._jobs_of(self._collector, row_weights)
            return
        for shown in self._shown:
            self._text.enter(shown.batch)
        for block in range(len(self.plans.decoder.blocks)):
            self.announce("gradients")
            with placement_of(self._model).at_work(block):
                yield self._jobs_of(self._collected(self._text, block), row_weights)
        self._text.clear()
        self._shown.clear()

    def _jobs_of(self, collector: InputCollector, row_weights: Mapping[str, Tensor]) -> dict[str, LinearJob]:
        """Return some of what is to be planned, statistics dealt out to the processes of the run."""
        ranks, recipes = self.plans.ranks, self.plans.recipes
        planned = {name: linear for name, linear in collector.linears.items() if recipes[name].scope == "model"}
        owners = owners_of(planned, collector, ranks)
        collector.reduce(owners, ranks)

        def statistics(name: str) -> InputStatistics | None:
            return collector.statistics(name) if owners[collector.leader(name)] == ranks.rank else None

        return {
            name: LinearJob(weight_matrix(linear), statistics(name), recipes[name], row_weights[name])
            for name, linear in planned.items()
        }

    def _collected(self, text: BatchesByBlock, block: int) -> InputCollector:
        """Carry all batches through a block, and return the statistics of what its linears received."""
        collector = InputCollector(self.plans.linears(block), self._tf32)

        def do(index: int, run: Callable[[Tensor], Tensor], entered: Tensor) -> None:
            shown = self._shown[index]
            # As where blocks stay: statistics are taken while gradients are.
            with torch.enable_grad(), collector.collecting(shown.batch_index, shown.real):
                left = run(entered.detach().requires_grad_())
            text.hidden.put(BATCHES, index, left)

        text.each(block, do, BATCHES)
        self.announce("plan")
        collector.check()
        return collector

    def resume(self, progress: Progress, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Take up the plans, and with them the calibration that follows."""
        device = placement_of(self._model).device_of(next(iter(self.plans.linears().values())))
        self.plans = progress.plans.restored(self.plans, device)
        self._next = self._then(self.plans)
        if progress.finished:
            self._count.expect(progress.batches)
            self._next.resume(progress.before(1), batches)
            self.plans = self._next.plans  # one budget
