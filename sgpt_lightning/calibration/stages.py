"""What every way to calibrate has in common: its stages, three steps, and the same batches in every epoch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from sgpt_lightning.calibration.meter import Announce
from sgpt_lightning.calibration.plan import Plans
from sgpt_lightning.calibration.progress import Progress
from sgpt_lightning.format.records import SolvedLinear


class Stage(NamedTuple):
    """One pass over the calibration batches, an epoch of the Trainer."""

    label: str
    """What it is about, for people."""
    blocks: int
    """Decoder blocks that are compressed when it has ended."""
    groups: tuple[tuple[str, ...], ...] = ()
    """Full names of the linears that are solved at its end, those of a group together, before the batches run again for
    the next; which of a block share an input, and so a group, is known once its first batch has run."""

    @property
    def linears(self) -> list[str]:
        """The linears that are solved at its end, in order."""
        return [name for group in self.groups for name in group]


class Calibration(Protocol):
    """What the callback and `compress` need of a way to calibrate."""

    plans: Plans
    """What is to be done to each linear."""
    announce: Announce
    """Told, while `finish` runs, what of it begins: see `forecast.py`, which alone wants to know."""

    @property
    def stages(self) -> Sequence[Stage]:
        """What each epoch is about, in order; their number and labels never change."""

    def observe(self, epoch: int, batch_index: int, batch: Mapping[str, Tensor]) -> None:
        """Take in one batch: `input_ids` `[batch, time]` and optionally `attention_mask`."""

    def finish(self, epoch: int) -> dict[str, SolvedLinear]:
        """Solve what the epoch was about, write it into the model, and return it by full name."""

    def resume(self, progress: Progress, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Take up another calibration's place, before anything else; the model is dense.

        Args:
            progress: where it stood; the next call is `observe` of epoch `progress.finished`.
            batches: the calibration batches, on the model's device; gone through once at most.
        """


class BatchCount:
    """Holds every epoch to the number of batches of the first."""

    def __init__(self) -> None:
        self._first = 0
        self._epoch = 0

    def add(self, epoch: int, batch_index: int) -> None:
        """Count a batch in.

        Raises:
            ValueError: the first epoch had fewer.
        """
        self._epoch = batch_index + 1
        if epoch == 0:
            self._first = self._epoch
        elif self._epoch > self._first:
            raise self._error(epoch)

    def expect(self, batches: int) -> None:
        """Hold the epochs to this number: the first was one of an earlier run."""
        self._first = batches

    def check(self, epoch: int) -> None:
        """Raise ValueError if the epoch that ends had other batches than the first."""
        if self._epoch != self._first:
            raise self._error(epoch)

    def _error(self, epoch: int) -> ValueError:
        return ValueError(
            f"epoch {epoch} has {self._epoch} batches or more, the first had {self._first}: every epoch must bring "
            "the same batches in the same order"
        )
