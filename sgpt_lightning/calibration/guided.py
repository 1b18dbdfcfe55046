"""Calibration with gradients: one epoch of the dense model, forwards and backwards, before another calibration."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from sgpt_lightning.calibration.collector import InputCollector
from sgpt_lightning.calibration.gradients import OutputGradients
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


class GuidedCalibration:
    """One epoch of gradients and plans on the dense model, then another calibration that follows them."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        plans: Plans,
        then: Callable[[Plans], Calibration],
        tf32: bool = False,
    ) -> None:
        linears = plans.linears()
        self._model = model
        self._recipe = recipe
        self.plans = plans
        self._then = then
        self._next = then(plans)
        self._count = BatchCount()
        self._gradients = OutputGradients(model, linears, plans.decoder.blocks, one_block=placement_of(model).moves)
        self._collector = InputCollector(linears if recipe.scope == "model" else {}, tf32)

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

    def finish(self, epoch: int) -> dict[str, SolvedLinear]:
        """Plan at the end of epoch 0; solve at the end of later ones."""
        ranks = self.plans.ranks
        with ranks.outcome():
            self._count.check(epoch)
            if not epoch:
                self._collector.check()
                self._gradients.check()
        if epoch:
            return self._next.finish(epoch - 1)
        self._gradients.reduce(ranks)
        weights = {name: self._gradients.row_weights(name) for name in self.plans.recipes}
        recipes, budget = self.plans.recipes, self.plans.budget
        if self._recipe.scope == "model":
            jobs = self._jobs(weights)
            if self._recipe.coding == "entropy":
                budget = budget.dealt(plan_rates(jobs, ranks))
            else:
                recipes = {**recipes, **plan_model(jobs, ranks)}
        self.plans = replace(self.plans, recipes=recipes, row_weights=weights, budget=budget)
        self._next = self._then(self.plans)
        return {}

    def _jobs(self, row_weights: Mapping[str, Tensor]) -> dict[str, LinearJob]:
        """Return what is to be planned over the model, statistics dealt out to the processes of the run."""
        collector, ranks = self._collector, self.plans.ranks
        linears, recipes = collector.linears, self.plans.recipes
        planned = {name: linears[name] for name in linears if recipes[name].scope == "model"}
        owners = owners_of(planned, collector, ranks)
        collector.reduce(owners, ranks)

        def statistics(name: str) -> InputStatistics | None:
            return collector.statistics(name) if owners[collector.leader(name)] == ranks.rank else None

        return {
            name: LinearJob(weight_matrix(linear), statistics(name), recipes[name], row_weights[name])
            for name, linear in planned.items()
        }

    def resume(self, progress: Progress, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Take up the plans, and with them the calibration that follows."""
        device = placement_of(self._model).device_of(next(iter(self.plans.linears().values())))
        self.plans = progress.plans.restored(self.plans, device)
        self._next = self._then(self.plans)
        if progress.finished:
            self._count.expect(progress.batches)
            self._next.resume(progress.before(1), batches)
            self.plans = self._next.plans  # one budget
