"""One-shot calibration: every block is watched during one pass of the dense model.

Cheaper and less exact than block by block: errors of earlier blocks are not seen by later ones, and all Hessians are
held at once. `true_sequential` and `alpha` are without effect: there is one pass, and it is the dense model's.

The batches are run in the first epoch; at the end of it the first block is solved, and at the end of each of the others
one more, so that what is solved is kept as it is block by block. A calibration that goes on from there runs the batches
through the dense model again, which costs little beside the solves.
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
    """One block per epoch, on the dense model's inputs; tokens are read in epoch 0 only."""

    def __init__(self, model: nn.Module, plans: Plans, storage_dtype: torch.dtype, tf32: bool = False) -> None:
        self.announce: Announce = nobody
        self._model = model
        self.plans = plans
        self._storage_dtype = storage_dtype
        self._placement = placement_of(model)
        blocks = len(plans.decoder.blocks)
        self.stages: Sequence[Stage] = [
            Stage(f"block {index + 1} of {blocks}", index + 1, (tuple(plans.linears(index)),))
            for index in range(blocks)
        ]
        self._tf32 = tf32
        self._collector = InputCollector(plans.linears(), tf32)

    def observe(self, epoch: int, batch_index: int, batch: Mapping[str, Tensor]) -> None:
        """Run the whole model under watch, in the first epoch."""
        if epoch == 0:
            self._run(batch_index, batch)

    def finish(self, epoch: int) -> dict[str, SolvedLinear]:
        """Solve the linears of block `epoch`."""
        ranks, linears = self.plans.ranks, self.plans.linears(epoch)
        if epoch == 0:
            self._check_inputs()
        mark_compressed(self._model)
        with self._placement.at_work(epoch):
            found = solve_linears(linears, self._collector, self.plans, self._storage_dtype)
            with ranks.outcome():
                check_stored(linears, found)
            check_everywhere(linears, ranks, self.stages[epoch].label)
            self._placement.keep(epoch, {name: linear.packed for name, linear in found.items()})
        return found

    def resume(self, progress: Progress, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Run the dense model for the blocks that are left, and write what was solved of the others."""
        device = self._placement.device_of(next(iter(self.plans.linears().values())))
        self.plans = progress.plans.restored(self.plans, device)
        self.plans.fallbacks.take_up(progress.solved)
        if not progress.finished:
            return
        left = range(progress.finished, len(self.stages))
        if left:
            linears = {name: linear for block in left for name, linear in self.plans.linears(block).items()}
            self._collector = InputCollector(linears, self._tf32)
            for index, batch in enumerate(batches):
                self._run(index, batch)
            self._check_inputs()
        mark_compressed(self._model)
        for block in range(progress.finished):
            linears = self.plans.linears(block)
            with self._placement.at_work(block):
                progress.write(linears)
                self._placement.keep(block, {n: progress.solved[n].packed for n in linears if n in progress.solved})

    @torch.no_grad()
    def _run(self, batch_index: int, batch: Mapping[str, Tensor]) -> None:
        for part in forwards(self._model, batch):
            shown, real = real_tokens(part)
            with self._collector.collecting(batch_index, real):
                self._model(**model_inputs(shown))

    def _check_inputs(self) -> None:
        """Raise ValueError if a linear received NaN or inf, unless it may be rounded for that."""
        with self.plans.ranks.outcome():
            if not self.plans.fallbacks.allowed:
                self._collector.check()
