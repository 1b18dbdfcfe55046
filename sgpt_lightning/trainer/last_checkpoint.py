"""The checkpoint that a run of the command line keeps: one file, in one place, at a tenth of the run's time at most.

Measured on the demo, on a busy CPU: 1.5 to 4.1 MB, written in 0.02 to 0.08 s at the end of blocks of 10 to 17 s.
"""

import os
import time
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from sgpt_lightning.trainer.callback import SparseGPTCallback
from sgpt_lightning.trainer.checkpoint_io import WholeCheckpointIO
from sgpt_lightning.trainer.resume import RunState

NAME = "last.ckpt"


class LastCheckpoint(ModelCheckpoint):
    """Keeps the last state of a run of `SparseGPTCallback`, for `fit(ckpt_path="last")`.

    It is written at the end of a block, unless that would take more than its share of the time since it was written
    before; and when the run is stopped. It holds what is solved in the form in which it will be stored, so it is as
    large as the linears in the compressed file at most. When the run is complete, it says so, in a few kilobytes. What
    cannot be written is warned of, and the run goes on.

    Args:
        dirpath: where `last.ckpt` is; None for `checkpoints` in the Trainer's `default_root_dir`, the same for every
            run there.
        share: part of the run's time that writing may take, a fraction above 0.

    Raises:
        ValueError: a share that is none.
    """

    def __init__(self, dirpath: str | None = None, share: float = 0.1) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share must be a fraction in (0, 1], got {share}")
        super().__init__(dirpath, save_top_k=0, save_last=True, save_on_train_epoch_end=True)
        self.share = share
        self.kept = 0
        """Stages of this run that are safe in the file; 0 if there is none of this run."""
        self.label = ""
        """The last of these stages, for people."""
        self._seconds = 0.0
        self._written = 0.0

    def path(self, trainer: Trainer) -> Path:
        """Return where the checkpoint is, or will be."""
        return Path(self.dirpath or os.path.join(trainer.default_root_dir, "checkpoints")) / NAME

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a run: nothing of it is kept."""
        self.dirpath = str(self.path(trainer).parent)
        super().setup(trainer, pl_module, stage)
        self.kept, self.label, self._seconds = 0, "", 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Know the file that the run goes on from, or warn of another run's that this one will replace."""
        self._written = time.monotonic()
        path, callback = self.path(trainer), _callback(trainer)
        if trainer.ckpt_path is None and trainer.is_global_zero:
            _warn_of_another(path)
        elif trainer.ckpt_path is not None and path.exists() and path.samefile(trainer.ckpt_path):
            self.kept, self.label = callback.state.finished, callback.state.label

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: the clock runs since `on_fit_start`."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was solved, if it is time."""
        due = time.monotonic() - self._written >= self._seconds / self.share
        if trainer.strategy.broadcast(due):
            self._keep(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what was solved, and say on the exception how to go on; of a complete run, that it is."""
        if trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero:
            return
        if _callback(trainer).state.target is not None:
            self.on_train_end(trainer, pl_module)
            return
        self._keep(trainer)
        if self.kept:
            path = str(self.path(trainer))
            exception.add_note(f"all up to {self.label} is kept: fit(..., ckpt_path={path!r}) goes on from there")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say in the file that the run is complete."""
        self._write(trainer)
        self.kept, self.label = 0, ""

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Do nothing: what there is to keep changes at the end of an epoch only."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: see `on_train_batch_end`."""

    def state_dict(self) -> dict[str, Any]:
        """Keep nothing of its own in the checkpoint."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: see `state_dict`."""

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        path = self.path(trainer)
        return {str(path)} if path.exists() else set()

    def _keep(self, trainer: Trainer) -> None:
        """Write the state that the run is in, unless the file holds it."""
        callback = _callback(trainer)
        if callback.state.finished > self.kept and self._write(trainer):
            self.kept, self.label = callback.state.finished, callback.state.label

    def _write(self, trainer: Trainer) -> bool:
        started = time.monotonic()
        try:
            # Not the Trainer's `save_checkpoint`: processes would wait there for the first one, should it fail.
            if trainer.is_global_zero:
                checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
                trainer.strategy.save_checkpoint(checkpoint, self.path(trainer))
        except OSError as error:
            then = f"the earlier one, of {self.label}, is as it was" if self.kept else "there is none yet"
            warnings.warn(f"{error}; {then}", stacklevel=2)
            return False
        self._written = time.monotonic()
        self._seconds = self._written - started
        self.last_model_path = str(self.path(trainer))
        return True


def _callback(trainer: Trainer) -> SparseGPTCallback:
    """Return the callback whose run is kept; raises ValueError if there is none."""
    found = [callback for callback in trainer.callbacks if isinstance(callback, SparseGPTCallback)]  # type: ignore[attr-defined]
    if not found:
        raise ValueError("LastCheckpoint keeps the run of a SparseGPTCallback: give the Trainer one, too")
    return found[0]


def _warn_of_another(path: Path) -> None:
    if not path.exists():
        return
    try:
        found = WholeCheckpointIO().load_checkpoint(path)["callbacks"].get(SparseGPTCallback().state_key)
        state = RunState.from_checkpoint(found, str(path))
    except (ValueError, KeyError):
        return  # nothing that a run could go on from
    if state.target is None and state.finished:
        warnings.warn(
            f"{path} is of a run that was stopped after {state.label}; this run begins anew and replaces it when its "
            "first block is solved. ckpt_path='last' goes on instead",
            stacklevel=2,
        )
