"""One-shot calibration: every block is watched during one pass of the dense model.

Cheaper and less exact than block by block: errors of earlier blocks are not seen by later ones, and all Hessians are
held at once. `true_sequential` and `alpha` are without effect: there is one pass, and it is the dense model's.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sgpt_lightning.calibration.collector import InputCollector
from sgpt_lightning.calibration.meter import Announce, nobody
from sgpt_lightning.calibration.plan import Plans
from sgpt_lightning.calibration.progress import Progress
from sgpt_lightning.calibration.solving import check_everywhere, check_stored, solve_linears
from sgpt_lightning.calibration.stages import Stage
from sgpt_lightning.format.records import SolvedLinear
from sgpt_lightning.models.batches import forwards, model_inputs, real_tokens
from sgpt_lightning.models.blocks import mark_compressed
from sgpt_lightning.models.placement import placement_of


class OneShotCalibration:
    """All blocks in one epoch, on the dense model's inputs."""

    def __init__(self, model: nn.Module, plans: Plans, storage_dtype: torch.dtype, tf32: bool = False) -> None:
        self.announce: Announce = nobody
        self._model = model
        self.plans = plans
        self._storage_dtype = storage_dtype
        self._placement = placement_of(model)
        self.stages: Sequence[Stage] = [Stage("all blocks", len(plans.decoder.blocks), (tuple(plans.linears()),))]
        self._collector = InputCollector(plans.linears(), tf32)

    @torch.no_grad()
    def observe(self, epoch: int, batch_index: int, batch: Mapping[str, Tensor]) -> None:
        """Run the whole model under watch."""
        for part in forwards(self._model, batch):
            shown, real = real_tokens(part)
            with self._collector.collecting(batch_index, real):
                self._model(**model_inputs(shown))

    def finish(self, epoch: int) -> dict[str, SolvedLinear]:
        """Solve every linear."""
        ranks = self.plans.ranks
        with ranks.outcome():
            if not self.plans.fallbacks.allowed:
                self._collector.check()
        mark_compressed(self._model)
        solved: dict[str, SolvedLinear] = {}
        for block in range(len(self.plans.decoder.blocks)):
            linears = self.plans.linears(block)
            with self._placement.at_work(block):
                found = solve_linears(linears, self._collector, self.plans, self._storage_dtype)
                with ranks.outcome():
                    check_stored(linears, found)
                check_everywhere(linears, ranks, self.stages[epoch].label)
                self._placement.keep(block, {name: linear.packed for name, linear in found.items()})
            solved |= found
        return solved

    def resume(self, progress: Progress, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Write what was solved: all or nothing."""
        device = self._placement.device_of(next(iter(self.plans.linears().values())))
        self.plans = progress.plans.restored(self.plans, device)
        for block in range(len(self.plans.decoder.blocks) if progress.finished else 0):
            mark_compressed(self._model)
            linears = self.plans.linears(block)
            with self._placement.at_work(block):
                progress.write(linears)
                self._placement.keep(block, {n: progress.solved[n].packed for n in linears if n in progress.solved})
